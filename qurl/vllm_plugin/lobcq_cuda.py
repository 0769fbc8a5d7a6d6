"""LO-BCQ on a GPU: the wire tensors stay as they come, and Triton kernels multiply them.

They are the layer's parameters, so the linear method moves later weights into the storage that CUDA graphs captured. The codebooks
never change; they are buffers, so that a compiler sees them as the layer's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qurl.quantization.base import QuantizationFormat
from qurl.quantization.kernels.triton import codebook_bytes, lobcq_encode, lobcq_matmul, nearest_codewords, rotated
from qurl.quantization.kernels.triton.matmul import SMALLEST_ARRAY
from qurl.quantization.lobcq import LoBcq
from qurl.vllm_plugin.kernels import LinearKernel, as_parameter, decode_parts


class CudaLoBcq(LinearKernel):
    """W4A4, or W4A16 where the format keeps activations, which a rotation then rounds to their dtype once more.

    Raises ValueError where tensor cores cannot multiply the arrays."""

    def __init__(self, format: LoBcq) -> None:
        if format.layout.array < SMALLEST_ARRAY:
            raise ValueError(
                f"quantization.format={format.name} has arrays of {format.layout.array} columns, and GPUs multiply "
                f"{SMALLEST_ARRAY} or more at once; give quantization.codebooks with longer arrays (L_A)"
            )
        self.format = format
        self.names: tuple[str, ...] = ()
        self.permute = format.layout.block == 8 and torch.version.hip is None

    def load(self, layer: Any, rows: Mapping[str, Tensor]) -> None:
        if not self.names:
            device, codebooks = rows["weight"].device, self.format.codebooks
            layer.register_buffer("codebooks", codebook_bytes(codebooks.weights).to(device), persistent=False)
            layer.register_buffer("nearest_codewords", nearest_codewords(codebooks.activations).to(device), persistent=False)
        self.names = tuple(rows)
        for name, tensor in rows.items():
            layer.register_parameter(name, as_parameter(tensor.contiguous()))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        tokens, layout = x.reshape(-1, x.shape[-1]), self.format.layout
        scales = None
        if self.format.rotation:
            tokens = rotated(tokens, self.format.rotation, x.dtype if self.format.keeps_activations else torch.float32)
        if not self.format.keeps_activations:
            tokens, scales = lobcq_encode(tokens, layer.nearest_codewords, layout.block, layout.array)
        selectors = layer.weight_selector if layout.selector_bits else None
        out = lobcq_matmul(
            tokens, scales, layer.weight, selectors, layer.weight_scale, layer.weight_global_scale, layer.codebooks, bias,
            layout.block, self.permute, x.dtype,
        )  # fmt: skip
        return out.view(*x.shape[:-1], -1)

    def decoded(self, layer: Any, format: QuantizationFormat, partitions: Sequence[int]) -> list[Tensor]:
        return decode_parts(format, {name: layer.get_parameter(name).data for name in self.names}, partitions)
