"""`quantization.group_size`: how many inputs share a scale, for the formats that can have any number."""

from __future__ import annotations

import copy

from qurl.quantization.base import QuantizationFormat
from qurl.quantization.int4 import Int4
from qurl.quantization.nf4 import Nf4

KEY = "quantization.group_size"
UNIT = 8
"""Codes of 4 bits fill the words of 32 bits of a compressed-tensors checkpoint."""
LARGEST = 1024


def with_group_size(format: QuantizationFormat, group_size: int) -> QuantizationFormat:
    """The format with groups of so many inputs; 0: the format as it is.

    Raises ValueError for a size that is no multiple of UNIT up to LARGEST, and a format whose groups are given.

    Example: with_group_size(FORMATS["int4"], 64).block is (1, 64)."""
    if group_size == 0:
        return format
    if isinstance(group_size, bool) or not 0 < group_size <= LARGEST or group_size % UNIT:
        raise ValueError(f"{KEY}={group_size} is no multiple of {UNIT} up to {LARGEST}; use 32 or 64, or 0 for the format's own")
    if not isinstance(format, Int4 | Nf4):
        raise ValueError(f"{KEY}={group_size} is for int4 and nf4, and {format.name} is given; set {KEY}=0 or change the format")
    if group_size == format.block[1]:
        return format
    grouped = copy.copy(format)
    grouped.block = (1, group_size)
    grouped.group_size = group_size
    if format.scheme is not None:
        grouped.scheme = {**format.scheme, "weights": {**format.scheme["weights"], "group_size": group_size}}
    return grouped
