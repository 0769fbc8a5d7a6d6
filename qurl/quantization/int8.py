"""INT8 W8A8: symmetric, one weight scale per output channel, one activation scale per token, found at run time.

Weight scale amax/127 and codes round(w / scale), ties to even, hence in [-127, 127]: -128 is never used, so negating a weight
negates its code. compressed-tensors' quantizer gives the same codes for these scales (its own observer divides by 127.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qurl.quantization.base import SMALLEST_SCALE, QuantizationFormat, scale_to, weight_matrix
from qurl.quantization.rounding import to_int8

LARGEST_CODE = 127.0


class Int8(QuantizationFormat):
    """weight int8 [O, I], weight_scale float32 [O, 1]."""

    name = "int8"
    rounds_stochastically = True
    scheme: dict[str, Any] | None = {
        "format": "int-quantized",
        "weights": {"type": "int", "strategy": "channel"},
        "input_activations": {"type": "int", "strategy": "token"},
    }

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Per-channel codes and scales; ValueError for NaN or Inf."""
        scaled, scale = self._scaled(weight)
        return {"weight": scaled.round_().to(torch.int8), "weight_scale": scale}

    def encode_stochastically(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """encode with unbiased codes."""
        scaled, scale = self._scaled(weight)
        return {"weight": to_int8(scaled, LARGEST_CODE, generator), "weight_scale": scale}

    def _scaled(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        matrix = weight_matrix(weight)
        scale = scale_to(matrix.abs().amax(dim=1, keepdim=True), LARGEST_CODE)
        return matrix / scale, scale

    def decode(self, wire: Mapping[str, Tensor]) -> Tensor:
        """[O, I] float32."""
        return wire["weight"].float() * wire["weight_scale"]

    def quantize_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """int8 codes [..., I] and float32 scales [..., 1], as vLLM's oneDNN kernel finds them.

        scale = amax/127, code = round(x * (1/scale)), ties to even: multiplying by the reciprocal decides some ties otherwise than
        dividing. A row of zeros has scale 0 and codes 0, and so has one too small for a finite reciprocal. NaN or Inf in a
        row makes its scale, and what is computed from it, non-finite."""
        x = x.float()
        scale = scale_to(x.abs().amax(dim=-1, keepdim=True), LARGEST_CODE, floor=0.0)
        reciprocal = scale.reciprocal().where(scale >= SMALLEST_SCALE, 0.0)
        return (x * reciprocal).round_().to(torch.int8), scale

    def linear(self, x: Tensor, wire: Mapping[str, Tensor], bias: Tensor | None = None) -> Tensor:
        """Exact integer sums, then float32: sum * activation scale * weight scale + bias. [..., I] -> [..., O] in x's dtype."""
        codes, scale = self.quantize_activations(x)
        total = codes.double() @ wire["weight"].double().T  # exact: below 2^53 for every I that occurs
        out = total.float() * scale * wire["weight_scale"].T
        return (out if bias is None else out + bias.float()).to(x.dtype)

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """8 and a float32 per row."""
        return 8.0 + 32.0 / shape[1]
