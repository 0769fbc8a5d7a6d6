"""FP8 W8A8 in E4M3 (largest value 448): one weight scale per output channel, one activation scale per token, found at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qurl.quantization.base import QuantizationFormat, scale_to, weight_matrix
from qurl.quantization.rounding import to_e4m3

LARGEST_CODE = torch.finfo(torch.float8_e4m3fn).max
SMALLEST_ACTIVATION_SCALE = 1.0 / (LARGEST_CODE * 512.0)
"""vLLM's floor for the scale of a token."""


class Fp8(QuantizationFormat):
    """weight float8_e4m3fn [O, I], weight_scale float32 [O, 1]."""

    name = "fp8"
    rounds_stochastically = True
    scheme = {
        "format": "float-quantized",
        "weights": {"type": "float", "strategy": "channel"},
        "input_activations": {"type": "float", "strategy": "token"},
    }

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Per-channel codes and scales; ValueError for NaN or Inf."""
        scaled, scale = self._scaled(weight)
        return {"weight": scaled.to(torch.float8_e4m3fn), "weight_scale": scale}

    def encode_stochastically(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """encode with unbiased codes."""
        scaled, scale = self._scaled(weight)
        return {"weight": to_e4m3(scaled, generator), "weight_scale": scale}

    def _scaled(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        matrix = weight_matrix(weight)
        scale = scale_to(matrix.abs().amax(dim=1, keepdim=True), LARGEST_CODE)
        return matrix / scale, scale

    def decode(self, wire: Mapping[str, Tensor]) -> Tensor:
        """[O, I] float32."""
        return wire["weight"].float() * wire["weight_scale"]

    def quantize_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float8_e4m3fn codes [..., I] and float32 scales [..., 1]: max(amax/448, 1/(448*512)), code = x / scale, ties to even."""
        x = x.float()
        scale = scale_to(x.abs().amax(dim=-1, keepdim=True), LARGEST_CODE, SMALLEST_ACTIVATION_SCALE)
        return (x / scale).to(torch.float8_e4m3fn), scale

    def linear(self, x: Tensor, wire: Mapping[str, Tensor], bias: Tensor | None = None) -> Tensor:
        """float32 sums of code products (each exact), then sum * activation scale * weight scale + bias, in x's dtype."""
        codes, scale = self.quantize_activations(x)
        out = (codes.float() @ wire["weight"].float().T) * scale * wire["weight_scale"].T
        return (out if bias is None else out + bias.float()).to(x.dtype)

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """8 and a float32 per row."""
        return 8.0 + 32.0 / shape[1]
