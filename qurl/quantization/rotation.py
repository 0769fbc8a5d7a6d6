"""`quantization.rotation`: a format that rotates weights and activations before it encodes them. See qurl.quantization.hadamard."""

from __future__ import annotations

import copy
import re

from qurl.quantization.base import QuantizationFormat
from qurl.quantization.grouped import GroupedFormat
from qurl.quantization.hadamard import SIZES

KEY = "quantization.rotation"


def with_rotation(format: QuantizationFormat, rotation: int) -> QuantizationFormat:
    """The format with blocks of so many inputs rotated; 0: the format as it is.

    Raises ValueError for another size than SIZES, and a format without groups of inputs, whose codes it would not improve."""
    if rotation == 0:
        return format
    if rotation not in SIZES or isinstance(rotation, bool):
        raise ValueError(f"{KEY}={rotation} is no size of a block; use 0 for none, or one of {', '.join(map(str, SIZES))}")
    if not isinstance(format, GroupedFormat):
        raise ValueError(
            f"{KEY}={rotation} needs a format whose scales belong to groups of inputs, such as quantization=lobcq, and "
            f"{format.name} is given; set {KEY}=0 or change the format"
        )
    rotated = copy.copy(format)
    rotated.rotation = rotation
    rotated.scheme = None  # compressed-tensors would not rotate the activations
    return rotated


def split_rotation(format: str) -> tuple[str, int]:
    """'lobcq@16' -> ('lobcq', 16): how benchmarks are told; a name without it has rotation 0."""
    match = re.fullmatch(r"(.+)@(\d+)", format)
    return (match[1], int(match[2])) if match else (format, 0)
