"""`quantization.codebooks`: LO-BCQ with other codebooks than the package's, and with their layout."""

from __future__ import annotations

from typing import Any

from qurl.quantization.base import QuantizationFormat
from qurl.quantization.lobcq.codebook_sets import KEY, codebook_sets_of
from qurl.quantization.lobcq.format import LoBcq

NAMES = {6: "lobcq or lobcq_w4a16", 8: "lobcq_int8"}
"""Formats by the bits of their codewords."""


def with_codebooks(format: QuantizationFormat, codebooks: Any) -> QuantizationFormat:
    """The format with these codebooks, as CodebookSets.content has them; None: the format as it is.

    Raises ValueError for a format that has none or whose codewords have other bits, and where they are damaged or have another
    hash than they state."""
    if codebooks is None:
        return format
    if not isinstance(format, LoBcq):
        raise ValueError(f"{KEY} needs quantization={' or '.join(NAMES.values())}, and {format.name} is given; remove it or change "
                         "the format")  # fmt: skip
    found = codebook_sets_of(codebooks, KEY)
    given, needed = found.layout.codeword_bits, format.layout.codeword_bits
    if given != needed:
        raise ValueError(
            f"{KEY} has codewords of {given} bits, and those of quantization={format.name} have {needed}; use quantization="
            f"{NAMES[given]}, or codebooks that were made with --codeword-bits {needed}"
        )
    return LoBcq(format.name, found.layout, found, format.keeps_activations)
