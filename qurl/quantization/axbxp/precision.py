"""Which blocks of an INT8 code take part in a product, and how a setting is written.

A setting is one word:

    k2-w2g16-a3g1         blocks of 2 bits; weights keep 2 of their 4, found anew for every 16 inputs; activations 3, each its own
    k4-w1-a2-truncated    blocks of 4 bits; weights keep the upper one, activations both; dropped bits are cut off
    k4-w2-a2-noll         both blocks of both, but not the product of the two lower ones

`g` and a number of inputs make the choice dynamic; without it the uppermost blocks are kept."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from itertools import product

MAGNITUDE_BITS = 7
"""Of an INT8 code between -127 and 127."""

GROUPS = (1, 2, 4, 8, 16, 32, 64, 128)

_SETTING = re.compile(r"k(\d)-w(\d)(?:g(\d+))?-a(\d)(?:g(\d+))?(?:-(truncated|balanced))?(-noll)?")
_GRAMMAR = (
    "k<bits of a block, 1-4>-w<blocks>[g<inputs>]-a<blocks>[g<inputs>], then maybe -truncated or -balanced, then maybe -noll; "
    "e.g. k2-w2g16-a3g1"
)


class Digits(Enum):
    """What the blocks of a code are, and what becomes of those that are dropped."""

    rounded = "rounded"  # sign and magnitude; the magnitude is rounded to the blocks that stay, ties to even
    truncated = "truncated"  # sign and magnitude; dropped blocks count as 0
    balanced = "balanced"  # digits from -2^(K-1) to 2^(K-1)-1, whose signs are their own; dropped ones count as 0


@dataclass(frozen=True, slots=True)
class Kept:
    """The blocks of one operand that take part."""

    blocks: int  # L
    group: int | None = None  # inputs that share the choice of the uppermost block; None: it is always the same

    def __str__(self) -> str:
        return str(self.blocks) if self.group is None else f"{self.blocks}g{self.group}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Raises ValueError for what no setting can mean."""

    block_bits: int  # K
    weight: Kept
    activation: Kept
    digits: Digits = Digits.rounded
    drops_low_product: bool = False
    """Of the products of upper and lower blocks, HH, HL, LH and LL, the last is left out."""

    def __post_init__(self) -> None:
        if not 1 <= self.block_bits <= 4:
            raise ValueError(f"{self._name}: blocks of {self.block_bits} bits do not exist; use k1, k2, k3 or k4")
        for letter, kept in (("w", self.weight), ("a", self.activation)):
            self._check_kept(letter, kept)
        if self.digits is Digits.balanced and self.block_bits == 1:
            raise ValueError(f"{self._name}: balanced digits of one bit have no 1; use k2, k3 or k4, or leave out -balanced")
        if self.drops_low_product and (self.block_bits, self.weight, self.activation) != (4, Kept(2), Kept(2)):
            raise ValueError(f"{self._name}: -noll leaves out one product of four and keeps all blocks; use k4-w2-a2-noll")

    def _check_kept(self, letter: str, kept: Kept) -> None:
        count = self.num_blocks
        if not 1 <= kept.blocks <= count:
            raise ValueError(
                f"{self._name}: codes have {count} blocks of {self.block_bits} bits, not as many as {letter}{kept.blocks}; "
                f"use {letter}1 to {letter}{count}"
            )
        if kept.group is not None and kept.blocks == count:
            raise ValueError(f"{self._name}: {letter}{kept} keeps all blocks and has none to choose; use {letter}{count}")
        if kept.group is not None and kept.group not in GROUPS:
            raise ValueError(f"{self._name}: {letter}{kept} has groups of {kept.group}; use one of {', '.join(map(str, GROUPS))}")

    @property
    def _name(self) -> str:
        return f"quantization.precision={str(self)!r}"

    @property
    def num_blocks(self) -> int:
        """N = ceil(7/K); the uppermost block may be short of bits."""
        return num_blocks(self.block_bits)

    @property
    def keeps_all(self) -> bool:
        """Whether products are int8's own: no block is dropped."""
        return self.weight.blocks == self.activation.blocks == self.num_blocks and not self.drops_low_product

    @property
    def structure(self) -> tuple[int, bool]:
        """What decides which operations of a product follow each other: inputs that share a choice of the activations' blocks, and
        whether LL is left out."""
        return self.activation.group or 1, self.drops_low_product

    def __str__(self) -> str:
        digits = "" if self.digits is Digits.rounded else f"-{self.digits.value}"
        return f"k{self.block_bits}-w{self.weight}-a{self.activation}{digits}{'-noll' if self.drops_low_product else ''}"


def num_blocks(block_bits: int) -> int:
    """Blocks of a magnitude."""
    return -(-MAGNITUDE_BITS // block_bits)


def parse(setting: str) -> Precision:
    """The inverse of str. Raises ValueError, naming quantization.precision, for a word that is no setting."""
    found = _SETTING.fullmatch(setting) if isinstance(setting, str) else None
    if found is None:
        raise ValueError(f"quantization.precision={setting!r} is no setting; use {_GRAMMAR}")
    bits, weight, weight_group, activation, activation_group, digits, noll = found.groups()
    return Precision(
        block_bits=int(bits),
        weight=Kept(int(weight), None if weight_group is None else int(weight_group)),
        activation=Kept(int(activation), None if activation_group is None else int(activation_group)),
        digits=Digits.rounded if digits is None else Digits(digits),
        drops_low_product=noll is not None,
    )


ALL_BLOCKS = parse("k4-w2-a2")
"""int8's own arithmetic."""


def all_precisions(
    block_bits: tuple[int, ...] = (1, 2, 3, 4), weight_groups: tuple[int | None, ...] = (None, 16),
    activation_groups: tuple[int | None, ...] = (None, 1), digits: Digits = Digits.rounded,
) -> list[Precision]:
    """Every setting with these blocks and groups, but for noll."""
    found = []
    for bits in block_bits:
        weights, activations = (_choices(bits, groups) for groups in (weight_groups, activation_groups))
        found += [
            Precision(block_bits=bits, weight=weight, activation=activation, digits=digits)
            for weight, activation in product(weights, activations)
        ]
    return found


def _choices(block_bits: int, groups: tuple[int | None, ...]) -> list[Kept]:
    """All blocks once; fewer with every group."""
    count = num_blocks(block_bits)
    return [*(Kept(blocks, group) for blocks in range(1, count) for group in groups), Kept(count)]
