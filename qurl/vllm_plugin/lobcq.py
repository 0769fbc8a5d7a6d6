"""LO-BCQ layers on the CPU that keep their weights packed: the engine's side of qurl.quantization.kernels.cpu."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qurl.quantization.base import QuantizationFormat
from qurl.quantization.kernels.cpu.lobcq import LoBcqKernel, kernel_of
from qurl.quantization.lobcq import LoBcq
from qurl.vllm_plugin.kernels import (
    LayerShape,
    LinearKernel,
    as_parameter,
    decode_parts,
    into_storage,
    register_format,
    registered_format,
)


class PackedLoBcq(LinearKernel):
    """C++ loops over codes, books and E4M3 scales as they are on the wire, in tiles; for a fused layer in one pass.

    Raises KernelsUnavailable where this machine has none."""

    def __init__(self, format: LoBcq, shape: LayerShape) -> None:
        self.format_key = register_format(format)
        self.shape = shape
        self.kernel = kernel_of(format)
        self.packed = torch.empty(0, dtype=torch.uint8)

    def load(self, layer: Any, rows: Mapping[str, Tensor]) -> None:
        self.packed = into_storage(self.packed, self.kernel.pack(rows))
        layer.register_parameter("weight", as_parameter(self.packed))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.qurl.lobcq_linear(x, layer.weight, bias, self.shape.rows, self.format_key)
        return _linear(self.kernel, x, layer.weight, bias, self.shape.rows)  # a call of an operator takes longer than this one

    def decoded(self, layer: Any, format: QuantizationFormat, partitions: Sequence[int]) -> list[Tensor]:
        rows = self.kernel.unpack(layer.weight.data, self.shape.rows, self.shape.columns)
        return decode_parts(format, rows, partitions)


@torch.library.custom_op("qurl::lobcq_linear", mutates_args=())
def _lobcq_linear(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, format: str) -> Tensor:
    """An operator of its own, so that a compiler sees one node."""
    quantization = registered_format(format)
    assert isinstance(quantization, LoBcq)
    return _linear(kernel_of(quantization), x, packed, bias, rows)


@_lobcq_linear.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, format: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _linear(kernel: LoBcqKernel, x: Tensor, packed: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """x [..., I] -> [..., rows]"""
    if x.dim() == 2:
        return kernel.linear(x, packed, rows, bias)
    return kernel.linear(x.reshape(-1, x.shape[-1]), packed, rows, bias).view(*x.shape[:-1], rows)
