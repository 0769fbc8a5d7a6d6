"""INT4 W4A16: symmetric, a bfloat16 scale for 128 inputs of a row (quantization.group_size: another number); activations stay as
they are.

Codes round(w / scale), ties to even, in [-7, 7], as in int8. The scale is amax/7 rounded up to bfloat16, so none is beyond 7."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qurl.quantization.base import scale_to
from qurl.quantization.grouped import GroupedFormat, bfloat16_not_below
from qurl.quantization.packing import pack, unpack
from qurl.quantization.rounding import to_int8

GROUP = 128
LARGEST_CODE = 7.0
OFFSET = 8
"""Added to a code to make it unsigned, as compressed-tensors does."""


class Int4(GroupedFormat):
    """weight uint8 [O, I/2], two codes + 8 a byte; weight_scale bfloat16 [O, I/128], or another group size."""

    name = "int4"
    block = (1, GROUP)
    keeps_activations = True
    shorter_blocks = "set quantization.group_size=32 or another divisor, "
    rounds_stochastically = True
    scheme = {
        "format": "pack-quantized",
        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP},
    }

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Codes and scales per group; ValueError for NaN, Inf or a number of inputs that is no multiple of the group."""
        scaled, scale = self._scaled(weight)
        return _wire(scaled.round_().to(torch.int8), scale)

    def encode_stochastically(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """encode with unbiased codes."""
        scaled, scale = self._scaled(weight)
        return _wire(to_int8(scaled, LARGEST_CODE, generator), scale)

    def _scaled(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = self.weight_groups(weight)
        scale = bfloat16_not_below(scale_to(groups.abs().amax(dim=-1), LARGEST_CODE))
        return groups / scale.float()[..., None], scale

    def decode(self, wire: Mapping[str, Tensor]) -> Tensor:
        """[O, I] float32."""
        codes = self.grouped(unpack(wire["weight"]).float() - OFFSET)
        return self.ungrouped(codes * wire["weight_scale"].float()[..., None])

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """4 and a bfloat16 per group."""
        return 4.0 + 16.0 / self.block[1]

    def checkpoint_tensors(self, wire: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Eight codes an int32, which has the same bytes, and the shape of the weight."""
        rows, half = wire["weight"].shape
        shape = torch.tensor([rows, 2 * half])
        return {"weight_packed": wire["weight"].view(torch.int32), "weight_scale": wire["weight_scale"], "weight_shape": shape}


def _wire(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """From int8 codes [O, groups, group]."""
    return {"weight": pack((codes + OFFSET).to(torch.uint8).flatten(-2)), "weight_scale": scale}
