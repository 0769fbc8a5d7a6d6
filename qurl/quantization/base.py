"""What a quantization format is.

A format turns one full-precision weight matrix into the tensors that travel to the engines and lie there ("wire tensors"), and
states the arithmetic an engine performs with them. The same object serves the learner (encode), the audit of an engine (decode)
and the tests of an engine's kernels (quantize_activations, linear), so all of them mean the same numbers.

Wire tensors are keyed by suffix: "weight" holds the codes (see qurl.quantization.packing for those of 4 bits) and "weight_scale"
the scales; the full name on the wire is f"{module}.{suffix}". Scales are kept at or above a tiny positive floor, so a row of zeros
needs no special case: its codes are 0 and it decodes to exact zeros."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qurl.quantization.targets import engine_groups

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Floor of weight scales: the smallest normal float32, whose reciprocal is finite."""


class QuantizationFormat(ABC):
    """Weights and activations of one linear layer in low precision. O: output features, I: input features."""

    name: str
    scheme: dict[str, Any] | None = None
    """compressed-tensors' words for the format: `format`, `weights` and, unless activations stay as they are, `input_activations`;
    None where it has none."""
    rounds_stochastically: ClassVar[bool] = False
    """Whether encode_stochastically works."""
    block: tuple[int, int] = (1, 1)
    """Rows and columns that share a scale, where it is not that of a whole row."""
    rotation: int = 0
    """Inputs of a block that is rotated, see qurl.quantization.rotation; 0: none."""
    group_size: int = 0
    """Inputs of a group where they are not the format's own number, see qurl.quantization.group_size; 0: its own."""
    has_whole_blocks: ClassVar[bool] = False
    """Whether I must be a multiple of block[1]; else the last block of a row may be shorter."""
    matrix_tensors: ClassVar[frozenset[str]] = frozenset()
    """Suffixes of wire tensors that hold one number for the whole matrix, [1]; all others but "weight" have rows by `block`."""
    shorter_blocks: ClassVar[str] = ""
    """What to do for shorter blocks, where there are any; for errors."""

    @abstractmethod
    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Wire tensors, by suffix, of a weight [O, I] of any floating dtype, layout and device; they are on the same device.

        Raises ValueError where the weight is not a matrix of finite floating-point numbers."""

    def encode_stochastically(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """encode with the same scales, but codes rounded at random such that decode has the weight as its mean; generator is on
        the weight's device. See qurl.quantization.rounding. Raises ValueError where the format has none, and as encode."""
        raise ValueError(f"quantization.update_awareness=stochastic_rounding: quantization={self.name} does not have it; use int8")

    @abstractmethod
    def decode(self, wire: Mapping[str, Tensor]) -> Tensor:
        """The weight that the wire tensors stand for; [O, I] float32."""

    @abstractmethod
    def quantize_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [..., I] and float32 scales [..., number of groups in a row] of activations [..., I]."""

    @abstractmethod
    def linear(self, x: Tensor, wire: Mapping[str, Tensor], bias: Tensor | None = None) -> Tensor:
        """What an engine computes: x [..., I] -> [..., O] in x's dtype. Accumulates and scales in float32 or better; the
        engine's own order of summation may differ in the last bits."""

    @property
    def codebooks_sha256(self) -> str | None:
        """Of the codebooks without which codes mean nothing; None where the format has none."""
        return None

    @property
    def key(self) -> str:
        """The name, the codebooks, the group size and the rotation: the same key is the same arithmetic, in every process."""
        name = self.name if self.codebooks_sha256 is None else f"{self.name}:{self.codebooks_sha256}"
        name = f"{name}:{self.group_size}" if self.group_size else name
        return f"{name}@{self.rotation}" if self.rotation else name

    @property
    def column_multiple(self) -> int:
        """Of which I must be a multiple."""
        return self.block[1] if self.has_whole_blocks else 1

    @abstractmethod
    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """Bits on the wire, scales included, over the number of weights of a matrix of shape (O, I)."""

    def of_layer(self, name: str) -> QuantizationFormat:
        """The format as one layer has it: the only one that encodes, decodes and multiplies what is the layer's. Names, shapes and
        dtypes on the wire are the same for all. name: of a Hugging Face module."""
        return self

    def of_layers(self, names: Sequence[str]) -> QuantizationFormat:
        """The format of modules that an engine runs as one matrix. Raises ValueError where it is not the same for all."""
        return self

    def check_layers(self, layers: Collection[str]) -> None:
        """Raises ValueError where a model whose quantized modules are these cannot have the format, as of_layers does."""
        for names in engine_groups(layers).values():
            self.of_layers(names)

    def shared_bits(self, layers: Collection[str]) -> int:
        """Bits beyond bits_per_weight, for all weights of these modules together."""
        return 0

    def wire_row(self, columns: int) -> dict[str, Tensor]:
        """Wire tensors of a weight of one row of ones, whose names, dtypes and widths are those of every layer."""
        return self.encode(torch.ones(1, columns))

    def check_columns(self, columns: int) -> None:
        """Raises ValueError where a weight with so many columns cannot be encoded."""
        if self.has_whole_blocks and columns % self.block[1]:
            raise ValueError(
                f"quantization={self.name} needs a multiple of {self.block[1]} input features, not {columns}; add the layer to "
                f"quantization.ignore, {self.shorter_blocks}or use quantization=int8"
            )

    @property
    def part(self) -> tuple[int, int]:
        """Tensor parallelism may cut a weight between rows and between columns that are multiples of these, where it cuts neither
        a block nor a byte that holds several values."""
        return self.block[0], max(self.block[1], self.column_multiple)

    def check_part(self, rows: int, columns: int) -> None:
        """Raises ValueError where the wire tensors of a weight cannot be cut into parts of this size; 0: it is not cut there."""
        for size, multiple, unit in zip((rows, columns), self.part, ("rows", "columns"), strict=True):
            if size % multiple:
                shorter = self.shorter_blocks + ("lower quantization.rotation, " if self.rotation > self.block[1] else "")
                raise ValueError(
                    f"quantization={self.name} needs a multiple of {multiple} {unit} in each, not {size}; use fewer ranks, "
                    f"{shorter}add the layer to quantization.ignore, or use quantization=int8"
                )

    def checkpoint_tensors(self, wire: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Wire tensors as a compressed-tensors checkpoint names and lays them out."""
        return dict(wire)

    def compressed_tensors_config(self, ignore: Sequence[str]) -> dict[str, Any] | None:
        """`quantization_config` of a checkpoint's config.json; None where the checkpoint is an ordinary one.

        ignore: names of the modules that stay in full precision."""
        if self.scheme is None:
            return None
        activations = self.scheme.get("input_activations")
        group = {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "symmetric": True, "dynamic": False, **self.scheme["weights"]},
            "input_activations": activations and {"num_bits": 8, "symmetric": True, "dynamic": True, **activations},
            "output_activations": None,
            "format": self.scheme["format"],
        }
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": self.scheme["format"],
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
            "kv_cache_scheme": None,
        }


def weight_matrix(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [O, I] in `dtype`. Raises ValueError where it is no floating-point matrix or holds NaN or Inf."""
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(f"a quantized weight must be a non-empty floating-point matrix; got {weight.dtype} {tuple(weight.shape)}")
    matrix = weight.detach().to(dtype)
    finite = matrix.isfinite()
    if not bool(finite.all()):
        bad = matrix.numel() - int(finite.sum())
        raise ValueError(
            f"weight {tuple(weight.shape)} holds {bad} values that are NaN or Inf in {dtype} and cannot be encoded; "
            "training has diverged or the checkpoint is damaged"
        )
    return matrix


def scale_to(amax: Tensor, largest_code: float, floor: float = SMALLEST_SCALE) -> Tensor:
    """The scale that maps amax (float32) to the largest code, at least `floor`.

    Divides by a tensor: CUDA turns division by a number into multiplication by its reciprocal, which differs in the last bit."""
    return (amax / number_like(largest_code, amax)).clamp(min=floor)


def number_like(number: float, tensor: Tensor) -> Tensor:
    """The number as a tensor of no dimension, with dtype and device of `tensor`.

    It is filled on the device. new_tensor copies from the host and waits for the stream, which a captured CUDA graph must not."""
    return torch.full((), number, dtype=tensor.dtype, device=tensor.device)
