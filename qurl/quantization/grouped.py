"""What 4-bit formats have in common: short groups of inputs with a scale each, and products of the numbers that codes stand for.

Groups are too short to sum codes first and scale afterwards, so the reference decodes both sides and multiplies in float32.
Nothing here multiplies 4-bit codes natively.

With a rotation, codes are those of rotated weights and activations, on the wire and in an engine; `decode` and
`round_activations` turn the numbers back, so what reads them need not know."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from qurl.quantization.base import QuantizationFormat, weight_matrix
from qurl.quantization.hadamard import rotate


class GroupedFormat(QuantizationFormat):
    """Groups of `block[1]` inputs, of which a weight must have a whole number."""

    has_whole_blocks = True
    keeps_activations: bool = False
    """Whether only weights are quantized."""

    @property
    def column_multiple(self) -> int:
        """Whole groups and whole blocks of the rotation."""
        return math.lcm(super().column_multiple, self.rotation or 1)

    def check_columns(self, columns: int) -> None:
        """Raises ValueError where a weight with so many columns has no whole number of groups or of rotated blocks."""
        super().check_columns(columns)
        if self.rotation and columns % self.rotation:
            raise ValueError(
                f"quantization.rotation={self.rotation} needs a multiple of {self.rotation} input features, not {columns}; use a "
                "smaller one, quantization.rotation=0, or add the layer to quantization.ignore"
            )

    def quantize_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x itself, not rotated, and scales of 1, [..., I] and [..., 1]: what a format does that quantizes weights only."""
        assert self.keeps_activations
        return x, x.new_ones((*x.shape[:-1], 1), dtype=torch.float32)

    def round_activations(self, x: Tensor) -> Tensor:
        """The numbers that the activations' codes stand for; [..., I] float32."""
        if self.keeps_activations:
            return x.float()
        codes, scale = self.quantize_activations(x)
        return self.ungrouped(self.grouped(codes) * scale[..., None])

    def linear(self, x: Tensor, wire: Mapping[str, Tensor], bias: Tensor | None = None) -> Tensor:
        """float32 sums of products of decoded numbers, + bias; [..., I] -> [..., O] in x's dtype."""
        return self.linear_decoded(x, self.decode(wire), bias)

    def linear_decoded(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """linear with a weight that was decoded before."""
        return functional.linear(self.round_activations(x), weight, None if bias is None else bias.float()).to(x.dtype)

    def grouped(self, values: Tensor) -> Tensor:
        """[..., I] -> [..., groups, group], a view."""
        return values.unflatten(-1, (-1, self.block[1]))

    def weight_groups(self, weight: Tensor) -> Tensor:
        """What is encoded of a weight, [O, groups, group] float32, rotated. Raises ValueError as encode does."""
        matrix = weight_matrix(weight)
        self.check_columns(matrix.shape[1])
        return self.grouped(rotate(matrix, self.rotation))

    def activation_groups(self, x: Tensor) -> Tensor:
        """What is encoded of activations [..., I]: [..., groups, group] float32, rotated."""
        return self.grouped(rotate(x.float(), self.rotation))

    def ungrouped(self, numbers: Tensor) -> Tensor:
        """The inverse of both, for the numbers that codes stand for: [..., groups, group] -> [..., I]."""
        return rotate(numbers.flatten(-2), self.rotation)


def bfloat16_not_below(x: Tensor) -> Tensor:
    """The smallest bfloat16 numbers that are at least x; x: float32, positive, normal."""
    return ((x.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32).bfloat16()
