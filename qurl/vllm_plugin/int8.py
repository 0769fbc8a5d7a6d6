"""INT8 layers on the CPU in C++, of whole codes or of Ax-BxP's kept blocks: the engine's side of qurl.quantization.kernels.cpu."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qurl.quantization import FORMATS
from qurl.quantization.base import QuantizationFormat
from qurl.quantization.kernels.cpu.int8 import has_kernel, kernel_of
from qurl.vllm_plugin.kernels import CodeProduct, LayerShape, into_storage, register_format, registered_format


def is_for(format: QuantizationFormat, shape: LayerShape) -> bool:
    """Whether CompiledInt8 is written for such a layer."""
    return has_kernel(format) and shape.device.type == "cpu"


class CompiledInt8(CodeProduct):
    """C++ loops over weights in tiles; they quantize activations themselves, or take codes.

    Raises KernelsUnavailable where this machine has none."""

    def __init__(self, format: QuantizationFormat, shape: LayerShape) -> None:
        self.format_key = register_format(format)
        self.shape = shape
        self.kernel = kernel_of(format)
        self.packed = torch.empty(0, dtype=torch.uint8)
        self.scale = torch.empty(0)

    def load(self, layer: Any, rows: Mapping[str, Tensor]) -> None:
        self.packed = self.kernel.pack(rows, self.packed)
        self.scale = into_storage(self.scale, rows["weight_scale"])

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.dim() != 2:
            return self.apply(layer, x.reshape(-1, x.shape[-1]), bias).reshape(*x.shape[:-1], -1)
        if torch.compiler.is_compiling():
            return torch.ops.qurl.int8_linear(x, self.packed, self.scale, bias, self.format_key)
        return self.kernel.linear(x, self.packed, self.scale, bias)  # a call of an operator takes longer than this one

    def multiply(self, layer: Any, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.qurl.int8_product(codes, scale, self.packed, self.scale, bias, dtype, self.format_key)
        return self.kernel.multiply(codes, scale, self.packed, self.scale, bias, dtype)

    def read_back(self, layer: Any) -> tuple[Tensor, Tensor]:
        return self.kernel.unpack(self.packed, self.shape.rows, self.shape.columns), self.scale

    def decoded(self, layer: Any, format: QuantizationFormat, partitions: Sequence[int]) -> list[Tensor]:
        return super().decoded(layer, FORMATS["int8"], partitions)  # which kept blocks are unpacked to


@torch.library.custom_op("qurl::int8_linear", mutates_args=())
def _int8_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, format: str) -> Tensor:
    """An operator of its own, so that a compiler sees one node."""
    return kernel_of(registered_format(format)).linear(x, packed, scale, bias)


@_int8_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, format: str) -> Tensor:
    return x.new_empty((x.shape[0], scale.shape[0]))


@torch.library.custom_op("qurl::int8_product", mutates_args=())
def _int8_product(
    codes: Tensor, token_scale: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, format: str
) -> Tensor:
    """As int8_linear, of activations that have codes."""
    return kernel_of(registered_format(format)).multiply(codes, token_scale, packed, scale, bias, dtype)


@_int8_product.register_fake
def _(
    codes: Tensor, token_scale: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, format: str
) -> Tensor:
    return codes.new_empty((codes.shape[0], scale.shape[0]), dtype=dtype)
