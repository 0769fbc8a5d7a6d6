"""Ax-BxP as a format: int8's codes and scales, multiplied with some of their blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qurl.quantization.axbxp.blocks import activation_table, keep, lower_parts, weight_table
from qurl.quantization.axbxp.precision import Precision
from qurl.quantization.int8 import Int8


class AxBxP(Int8):
    """weight int8 [O, I], weight_scale float32 [O, 1]: the wire of int8, whatever the precision."""

    rounds_stochastically = False  # the mean of rounded codes is the weight, but not of what is kept of them
    scheme = None

    def __init__(self, name: str, precision: Precision, layers: Mapping[str, Precision] | None = None) -> None:
        """precision: of every layer that `layers` does not name; see of_layer."""
        self.name = name
        self.precision = precision
        self.layers = dict(layers or {})

    def of_layer(self, name: str) -> AxBxP:
        """The format with the precision of one layer, a Hugging Face module."""
        return AxBxP(self.name, self.layers.get(name, self.precision))

    def of_layers(self, names: Sequence[str]) -> AxBxP:
        """Raises ValueError where their precisions differ."""
        formats = [self.of_layer(name) for name in names]
        if len({each.precision for each in formats}) > 1:
            listed = ", ".join(f"{name} {each.precision}" for name, each in zip(names, formats, strict=True))
            raise ValueError(
                f"quantization.precision gives the parts of one matrix of the engine different settings ({listed}); give all the "
                "same"
            )
        return formats[0]

    def encode_stochastically(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Raises ValueError: there is none."""
        return super(Int8, self).encode_stochastically(weight, generator)

    def codes(self, wire: Mapping[str, Tensor]) -> Tensor:
        """The codes on the wire, int8 [O, I]."""
        return wire["weight"]

    def decode(self, wire: Mapping[str, Tensor]) -> Tensor:
        """[O, I] float32, without the blocks of weights that are dropped."""
        return keep(self.codes(wire), weight_table(self.precision)).float() * wire["weight_scale"]

    def quantize_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """int8's codes without the blocks that are dropped, [..., I], and int8's scales [..., 1]."""
        codes, scale = super().quantize_activations(x)
        return keep(codes, activation_table(self.precision)), scale

    def linear(self, x: Tensor, wire: Mapping[str, Tensor], bias: Tensor | None = None) -> Tensor:
        """Exact integer sums of the products that are kept, then as int8; [..., I] -> [..., O] in x's dtype."""
        codes, scale = self.quantize_activations(x)
        weight = keep(self.codes(wire), weight_table(self.precision))
        total = codes.double() @ weight.double().T
        if self.precision.drops_low_product:
            low, low_weight = (lower_parts(operand, self.precision.digits).double() for operand in (codes, weight))
            total -= low @ low_weight.T
        out = total.float() * scale * wire["weight_scale"].T
        return (out if bias is None else out + bias.float()).to(x.dtype)
