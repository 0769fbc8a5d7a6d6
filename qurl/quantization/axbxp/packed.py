"""Ax-BxP with nothing but the kept blocks of the weights on the wire.

A weight is its sign, L blocks of K bits, and every 16 inputs share the number of their lowest block. Expanding is a shift. Sign and
three bits fill a nibble; four bits do so alone, and signs lie beside them:

    K L = 3    weight nibble: bit 3 the sign, bits 0-2 the blocks
    K L = 4    weight nibble: the blocks; weight_sign: a bit each, low bit first

What comes out is what `keep` makes of int8's codes, bit for bit, so an engine may run it as INT8. A weight that changes nothing but
its sign counts as unchanged in sync/changed_code_fraction where signs lie beside the codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qurl.quantization.axbxp.blocks import group_lowest, keep, weight_table
from qurl.quantization.axbxp.format import AxBxP
from qurl.quantization.axbxp.precision import Digits, Precision
from qurl.quantization.packing import pack, pack_bits, unpack, unpack_bits

SIGN = 8
"""Of a nibble that has one."""


class PackedAxBxP(AxBxP):
    """weight uint8 [O, I/2], two nibbles a byte, that of the even column in the low half; weight_sign uint8 [O, ceil(I/8)] where
    K L = 4; weight_index uint8 [O, ceil(index_bits I / (8 group))], the lowest block of each group, low bit first; weight_scale
    float32 [O, 1]."""

    has_whole_blocks = True

    def __init__(self, name: str, precision: Precision) -> None:
        """Raises ValueError for a precision whose weights have no such layout."""
        kept = precision.weight
        self.magnitude_bits = kept.blocks * precision.block_bits
        if self.magnitude_bits not in (3, 4) or (kept.group or 1) % 2 or precision.digits is Digits.balanced:
            raise ValueError(
                f"weights of {precision} do not fill nibbles; use 3 or 4 bits of magnitude, a group of 2 or more and no -balanced, "
                "e.g. k2-w2g16-a4"
            )
        if precision.activation.blocks != precision.num_blocks:
            raise ValueError(f"activations of {precision} are not INT8, as they are with weights in nibbles; use k2-w2g16-a4")
        super().__init__(name, precision)
        self.group = kept.group or 1
        self.block = (1, self.group)
        self.index_bits = (precision.num_blocks - kept.blocks).bit_length()

    @property
    def part(self) -> tuple[int, int]:
        """Indices and signs fill whole bytes."""
        return 1, math.lcm(8, self.group * (8 // math.gcd(8, self.index_bits)))

    def of_layer(self, name: str) -> PackedAxBxP:
        return self

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Kept blocks of int8's codes; ValueError for NaN, Inf or a number of inputs that is no multiple of the group."""
        wire = super().encode(weight)
        self.check_columns(weight.shape[1])
        return {**self.pack(wire["weight"]), "weight_scale": wire["weight_scale"]}

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        """All but the scales, of int8 codes [O, I]."""
        table = weight_table(self.precision)
        lowest = group_lowest(codes, table).to(torch.uint8)
        kept = keep(codes, table)
        nibbles = kept.abs().view(torch.uint8) >> self._shifts(lowest)
        sign = (kept < 0).to(torch.uint8)
        wire = {"weight": pack(nibbles if self.magnitude_bits == 4 else nibbles | (sign * SIGN))}
        if self.magnitude_bits == 4:
            wire["weight_sign"] = pack_bits(sign, 1)
        return {**wire, "weight_index": pack_bits(lowest, self.index_bits)}

    def codes(self, wire: Mapping[str, Tensor]) -> Tensor:
        """int8 [O, I] without the dropped blocks: the inverse of pack."""
        nibbles = unpack(wire["weight"])
        columns = nibbles.shape[1]
        if self.magnitude_bits == 4:
            sign = unpack_bits(wire["weight_sign"], 1, columns)
        else:
            sign, nibbles = nibbles >> 3, nibbles & (SIGN - 1)
        lowest = unpack_bits(wire["weight_index"], self.index_bits, columns // self.group)
        magnitude = (nibbles << self._shifts(lowest)).view(torch.int8)
        return magnitude.where(sign == 0, -magnitude)

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """4, a sign beside four bits, an index per group, where rows are whole bytes, and a float32 per row."""
        columns = shape[1]
        sign_bytes = -(-columns // 8) if self.magnitude_bits == 4 else 0
        index_bytes = -(-columns // self.group * self.index_bits // 8)
        return 4.0 + (8.0 * (sign_bytes + index_bytes) + 32.0) / columns

    def _shifts(self, lowest: Tensor) -> Tensor:
        """Of each input, from the lowest block of each group; uint8 [O, I]."""
        return (lowest * self.precision.block_bits).repeat_interleave(self.group, dim=1)
