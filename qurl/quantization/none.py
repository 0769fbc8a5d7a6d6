"""Full precision: the engine runs the learner's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import functional

from qurl.quantization.base import QuantizationFormat, weight_matrix


class Unquantized(QuantizationFormat):
    """Weights travel as they are; the sender casts them to the engine's dtype."""

    name = "none"

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The weight itself, not a copy."""
        return {"weight": weight_matrix(weight, weight.dtype)}

    def decode(self, wire: Mapping[str, Tensor]) -> Tensor:
        """[O, I] float32."""
        return wire["weight"].float()

    def quantize_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x itself and scales of 1; [..., I] and [..., 1]."""
        return x, x.new_ones((*x.shape[:-1], 1)).float()

    def linear(self, x: Tensor, wire: Mapping[str, Tensor], bias: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias in x's dtype."""
        return functional.linear(x, wire["weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """16: engines hold unquantized weights in bfloat16 or float16 unless told otherwise."""
        return 16.0
