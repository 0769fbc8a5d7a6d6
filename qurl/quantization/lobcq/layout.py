"""The numbers that make a variant of LO-BCQ."""

from __future__ import annotations

import math
from dataclasses import dataclass

NUM_ENTRIES = 16
"""Of a codebook: codes have 4 bits."""

_CHOICES = {
    "block": (2, 4, 8), "array": (16, 32, 64, 128), "num_codebooks": (1, 2, 4, 8, 16), "codeword_bits": (6, 8),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Raises ValueError for a number that is none of the choices."""

    block: int = 8  # L_b: inputs that share a codebook
    array: int = 64  # L_A: inputs that share a scale
    num_codebooks: int = 16  # N_c
    codeword_bits: int = 6  # B_c: of a codebook's entries; 6 in the paper

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"LO-BCQ with {name}={getattr(self, name)}: use one of {', '.join(map(str, choices))}")

    @property
    def largest(self) -> int:
        """The largest codeword: 31 or 127."""
        return 2 ** (self.codeword_bits - 1) - 1

    @property
    def selector_bits(self) -> int:
        """log2(N_c): of the number of a codebook."""
        return self.num_codebooks.bit_length() - 1

    @property
    def set_bits(self) -> int:
        """N_c * 16 * B_c: of a set of codebooks."""
        return self.num_codebooks * NUM_ENTRIES * self.codeword_bits

    @property
    def file_name(self) -> str:
        """Of its codebooks."""
        return f"lb{self.block}_la{self.array}_nc{self.num_codebooks}_int{self.codeword_bits}.json"

    def bits_per_number(self, count: float = math.inf) -> float:
        """4 + log2(N_c)/L_b + 8/L_A, and the codebooks' own bits spread over `count` numbers that use them, as the paper counts."""
        return 4.0 + self.selector_bits / self.block + 8.0 / self.array + self.set_bits / count
