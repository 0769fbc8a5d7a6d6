"""What multiplies: one kernel per layer, chosen once from format, device, dtype and shape.

    int8       CPU: vLLM's AMX kernel where the CPU has AMX, activations are bfloat16 and the shape fits; else oneDNN. On a CPU
               without VNNI oneDNN's products are wrong: there C++ that is compiled on first use, see qurl.vllm_plugin.int8
               (where that fails, float32 products).
               GPU: vLLM's choice (CUTLASS first).
    fp8        CPU: exact emulation in float32. GPU: vLLM's choice of W8A8 kernel.
    fp8_block  the same.
    lobcq      and its variants: packed weights are multiplied, on the CPU in C++ that is compiled on first use, see
               qurl.vllm_plugin.lobcq (where that fails, as the others of 4 bits); on a GPU in Triton.
    axbxp      see qurl.vllm_plugin.axbxp.
    4 bits     everywhere: activations rounded to the format's numbers, times the decoded weight in float32.

The AMX kernel scales activations by 127/amax where oneDNN multiplies by 1/(amax/127): codes differ by one where a value lies
exactly between two codes (some 4 of 10,000 values that come from bfloat16), and nowhere else.

A kernel owns its weights on the CPU; on a GPU it leaves them in the layer's parameters, as vLLM's kernels do."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from qurl.quantization import FORMATS
from qurl.quantization.axbxp import AxBxP
from qurl.quantization.base import QuantizationFormat
from qurl.quantization.devices import lacks
from qurl.quantization.grouped import GroupedFormat
from qurl.quantization.kernels.cpu.library import KernelsUnavailable
from qurl.quantization.lobcq import LoBcq
from qurl.vllm_plugin import compat

logger = logging.getLogger(__name__)
_announced: set[str] = set()
_formats: dict[str, QuantizationFormat] = {}
"""Of the layers of this process, by QuantizationFormat.key: operators take a word, since a compiler knows no formats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """One rank's part of a linear layer."""

    partitions: tuple[int, ...]  # rows of each fused matrix
    columns: int
    dtype: torch.dtype  # of activations
    device: torch.device

    @property
    def rows(self) -> int:
        """Output features."""
        return sum(self.partitions)


class LinearKernel(ABC):
    """One layer, whose weights come as `rows`: the wire tensors with one row per output feature, see `rows_of`."""

    @abstractmethod
    def load(self, layer: Any, rows: Mapping[str, Tensor]) -> None:
        """Take new weights, packing them as needed. Reads layer.bias, which must have been loaded."""

    @abstractmethod
    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I] -> [..., O] in x's dtype."""

    @abstractmethod
    def decoded(self, layer: Any, format: QuantizationFormat, partitions: Sequence[int]) -> list[Tensor]:
        """What `apply` multiplies with: a float32 matrix [rows, I] per fused matrix."""


class CodeKernel(LinearKernel):
    """A kernel that multiplies codes."""

    @abstractmethod
    def read_back(self, layer: Any) -> tuple[Tensor, Tensor]:
        """The codes and scales that `apply` works with."""

    def decoded(self, layer: Any, format: QuantizationFormat, partitions: Sequence[int]) -> list[Tensor]:
        codes, scale = self.read_back(layer)
        return decode_parts(format, {"weight": codes, "weight_scale": scale}, partitions)


class CodeProduct(CodeKernel):
    """A kernel of int8 that can be given codes of activations."""

    @abstractmethod
    def multiply(self, layer: Any, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Codes int8 [T, I] and scales float32 [T, 1] of activations -> [T, O] in `dtype`."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.dim() != 2:
            return self.apply(layer, x.reshape(-1, x.shape[-1]), bias).reshape(*x.shape[:-1], -1)
        return self.multiply(layer, *compat.int8_quantize(x), bias, x.dtype)


def select_kernel(format: QuantizationFormat, layer: Any, shape: LayerShape) -> LinearKernel:
    """The kernel for a layer of this format. Raises ValueError where the device has none for it."""
    kernel: LinearKernel
    reason = ""
    if shape.device.type == "cuda":
        capability = torch.cuda.get_device_capability(shape.device)
        if lacking := lacks(format, capability):
            raise ValueError(f"quantization={format.name} {lacking} (this GPU has {capability[0]}.{capability[1]})")
    if isinstance(format, LoBcq) and shape.device.type == "cuda":
        from qurl.vllm_plugin.lobcq_cuda import CudaLoBcq

        kernel = CudaLoBcq(format)
    elif isinstance(format, GroupedFormat):
        kernel, reason = _grouped_kernel(format, shape)
    elif isinstance(format, AxBxP):
        from qurl.vllm_plugin.axbxp import select_axbxp_kernel

        kernel = select_axbxp_kernel(format, layer, shape)
    elif shape.device.type == "cuda":
        from qurl.vllm_plugin.cuda import select_cuda_kernel

        kernel = select_cuda_kernel(format, layer, shape)
    elif format.name == "int8":
        kernel = _cpu_int8_kernel(shape)
    else:
        kernel = Emulation(format, shape)
    _announce(format, kernel, reason)
    return kernel


def _grouped_kernel(format: GroupedFormat, shape: LayerShape) -> tuple[LinearKernel, str]:
    """And why it is not a better one, where that is for want of something."""
    if isinstance(format, LoBcq) and shape.device.type == "cpu":
        from qurl.vllm_plugin.lobcq import PackedLoBcq

        try:
            return PackedLoBcq(format, shape), ""
        except KernelsUnavailable as error:
            return Decoded(format, shape), f" ({error})"
    return Decoded(format, shape), ""


def _cpu_int8_kernel(shape: LayerShape) -> LinearKernel:
    if compat.amx_int8_usable(shape.rows, shape.columns, shape.dtype):
        return AmxInt8(shape)
    return cpu_code_product(shape)


def cpu_code_product(shape: LayerShape) -> CodeProduct:
    """The fastest exact product of codes on this CPU but for AMX, whose kernel takes no codes."""
    from qurl.vllm_plugin.int8 import CompiledInt8

    if compat.onednn_int8_is_exact():
        return OneDnnInt8(shape)
    try:
        return CompiledInt8(FORMATS["int8"], shape)
    except KernelsUnavailable as error:
        warn_once(f"INT8 codes are multiplied in floating point: this CPU has no VNNI, without which oneDNN is wrong ({error})")
        return FloatingInt8(shape)


class AmxInt8(CodeKernel):
    """vLLM's AMX kernel; it quantizes activations itself."""

    def __init__(self, shape: LayerShape) -> None:
        self.shape = shape
        self.packed = self.scale = self.bias = torch.empty(0)

    def load(self, layer: Any, rows: Mapping[str, Tensor]) -> None:
        self.packed = into_storage(self.packed, compat.amx_int8_pack(rows["weight"]))
        self.scale = into_storage(self.scale, rows["weight_scale"])
        bias = getattr(layer, "bias", None)
        if bias is not None:
            self.bias = into_storage(self.bias, bias.data.float())

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.dim() != 2:
            return self.apply(layer, x.reshape(-1, x.shape[-1]), bias).reshape(*x.shape[:-1], -1)
        return compat.amx_int8_linear(x, self.packed, self.scale, None if bias is None else self.bias)

    def read_back(self, layer: Any) -> tuple[Tensor, Tensor]:
        return _probe_codes(self, layer, self.scale, self.shape), self.scale


class OneDnnInt8(CodeProduct):
    """oneDNN through vLLM. The handler owns the packed codes and points into `scale`."""

    def __init__(self, shape: LayerShape) -> None:
        self.shape = shape
        self.rows = shape.rows
        self.scale = self.handler_tensor = torch.empty(0)
        self.handler: Any = None

    def load(self, layer: Any, rows: Mapping[str, Tensor]) -> None:
        self.scale = into_storage(self.scale, rows["weight_scale"])
        self.handler = compat.onednn_int8_handler(rows["weight"], self.scale, self.shape.dtype)
        self.handler_tensor = self.handler.handler_tensor

    def multiply(self, layer: Any, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return compat.onednn_int8_product(codes, scale, self.handler_tensor, self.rows, bias, dtype)

    def read_back(self, layer: Any) -> tuple[Tensor, Tensor]:
        return _probe_codes(self, layer, self.scale, self.shape), self.scale


class FloatingInt8(CodeProduct):
    """INT8 codes held as float32, for CPUs without INT8 instructions or a compiler: four bytes a weight, and the speed of a float32
    product, exact while sums stay below 2^24."""

    def __init__(self, shape: LayerShape) -> None:
        self.codes = self.scale = torch.empty(0)

    def load(self, layer: Any, rows: Mapping[str, Tensor]) -> None:
        self.codes = into_storage(self.codes, rows["weight"].float())
        self.scale = into_storage(self.scale, rows["weight_scale"])

    def multiply(self, layer: Any, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        out = functional.linear(codes.float(), self.codes).mul_(scale).mul_(self.scale.view(1, -1))
        return (out if bias is None else out.add_(bias)).to(dtype)

    def read_back(self, layer: Any) -> tuple[Tensor, Tensor]:
        return self.codes.to(torch.int8), self.scale


class Emulation(CodeKernel):
    """The format's own torch arithmetic: same codes, same scales, float32 products. Slow; for CPUs without the instructions."""

    def __init__(self, format: QuantizationFormat, shape: LayerShape) -> None:
        self.format_key = register_format(format)
        self.shape = shape
        self.partitions = list(shape.partitions)
        self.codes = self.scale = torch.empty(0)

    def load(self, layer: Any, rows: Mapping[str, Tensor]) -> None:
        self.codes = into_storage(self.codes, rows["weight"])
        self.scale = into_storage(self.scale, rows["weight_scale"])

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.qurl.emulated_linear(x, self.codes, self.scale, bias, self.format_key, self.partitions)

    def read_back(self, layer: Any) -> tuple[Tensor, Tensor]:
        return self.codes, self.scale


@torch.library.custom_op("qurl::emulated_linear", mutates_args=())
def _emulated_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, format: str, partitions: Sequence[int]
) -> Tensor:
    """An operator of its own, so that a compiler leaves the arithmetic alone."""
    quantization = registered_format(format)
    matrices = split_wire(quantization, {"weight": codes, "weight_scale": scale}, partitions)
    out = torch.cat([quantization.linear(x.float(), wire) for wire in matrices], dim=-1)
    return (out if bias is None else out + bias.float()).to(x.dtype)


@_emulated_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, format: str, partitions: Sequence[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


class Decoded(LinearKernel):
    """The format's own torch arithmetic with a weight that is decoded once, when it is loaded: four bytes a weight, and the speed
    of a float32 product after rounding the activations."""

    def __init__(self, format: GroupedFormat, shape: LayerShape) -> None:
        self.format = format
        self.format_key = register_format(format)
        self.shape = shape
        self.weight = torch.empty(0)

    def load(self, layer: Any, rows: Mapping[str, Tensor]) -> None:
        self.weight = into_storage(self.weight, torch.cat(decode_parts(self.format, rows, self.shape.partitions)))
        layer.register_parameter("weight", as_parameter(self.weight))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.qurl.decoded_linear(x, layer.weight, bias, self.format_key)

    def decoded(self, layer: Any, format: QuantizationFormat, partitions: Sequence[int]) -> list[Tensor]:
        return [part.clone() for part in layer.weight.data.split(list(partitions))]


@torch.library.custom_op("qurl::decoded_linear", mutates_args=())
def _decoded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, format: str) -> Tensor:
    """As emulated_linear, with a decoded weight."""
    quantization = registered_format(format)
    assert isinstance(quantization, GroupedFormat)
    return quantization.linear_decoded(x, weight, bias)


@_decoded_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, format: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def register_format(format: QuantizationFormat) -> str:
    """The key by which registered_format finds it, in this process."""
    _formats[format.key] = format
    return format.key


def registered_format(key: str) -> QuantizationFormat:
    """Of a layer that was made in this process."""
    return _formats[key]


def num_wire_rows(format: QuantizationFormat, name: str, rows: int) -> int:
    """Rows of the wire tensor `name` of a matrix that has so many."""
    if name in format.matrix_tensors:
        return 1
    return rows if name == "weight" else -(-rows // format.block[0])


def rows_of(format: QuantizationFormat, name: str, tensor: Tensor, rows: int) -> Tensor:
    """The wire tensor `name` of a matrix with one row per output feature, so that it shards and fuses like the codes."""
    if name in format.matrix_tensors:
        return tensor.view(1, 1).expand(rows, 1)
    return tensor if name == "weight" else tensor.repeat_interleave(format.block[0], dim=0)[:rows]


def wire_of(format: QuantizationFormat, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wire tensors of one matrix: the inverse of rows_of."""
    wire = {}
    for name, tensor in rows.items():
        if name in format.matrix_tensors:
            wire[name] = tensor[0]
        else:
            wire[name] = tensor if name == "weight" else tensor[:: format.block[0]]
    return wire


def split_wire(format: QuantizationFormat, rows: Mapping[str, Tensor], partitions: Sequence[int]) -> list[dict[str, Tensor]]:
    """Wire tensors of each of the fused matrices."""
    parts = {name: tensor.split(list(partitions)) for name, tensor in rows.items()}
    return [wire_of(format, {name: part[i] for name, part in parts.items()}) for i in range(len(partitions))]


def decode_parts(format: QuantizationFormat, rows: Mapping[str, Tensor], partitions: Sequence[int]) -> list[Tensor]:
    """float32 [rows, I] of each of the fused matrices."""
    return [format.decode(wire) for wire in split_wire(format, rows, partitions)]


def into_storage(storage: Tensor, value: Tensor) -> Tensor:
    """`value` in the storage of the previous weights: whatever points to it stays right, and memory does not fragment."""
    if storage.shape != value.shape:  # there are none yet
        return value.detach().clone()
    return storage.copy_(value)


def _probe_codes(kernel: LinearKernel, layer: Any, scale: Tensor, shape: LayerShape) -> Tensor:
    """Codes [O, I] out of an opaque packed layout: what the kernel makes of the identity, divided by the scales.

    A token with one value other than zero is quantized to 127 exactly, so the output is value * code * scale up to rounding of the
    activation dtype: a relative error of at most 2^-8, i.e. less than half a code."""
    value = (1.0 / scale.max()).clamp(max=1e4).to(shape.dtype)  # keeps float16 outputs normal
    columns = []
    for start in range(0, shape.columns, 1024):
        width = min(1024, shape.columns - start)
        one_hot = torch.zeros((width, shape.columns), dtype=shape.dtype)
        one_hot[torch.arange(width), torch.arange(start, start + width)] = value
        columns.append((kernel.apply(layer, one_hot, None).float() / (value.float() * scale.T)).round_().to(torch.int8).T)
    return torch.cat(columns, dim=1)


def _announce(format: QuantizationFormat, kernel: LinearKernel, reason: str) -> None:
    name = f"{format.name} {type(kernel).__name__}"
    if name in _announced:
        return
    _announced.add(name)
    if isinstance(kernel, Emulation | Decoded):
        logger.warning("%s is emulated on this device%s: exact codes and scales, float32 products, slow", format.name, reason)
    else:
        logger.info("%s linear layers run on %s", format.name, type(kernel).__name__)


def warn_once(message: str) -> None:
    """In this process."""
    if message not in _announced:
        _announced.add(message)
        logger.warning("%s", message)


def as_parameter(tensor: Tensor) -> Parameter:
    """A parameter that does not learn."""
    return Parameter(tensor, requires_grad=False)
