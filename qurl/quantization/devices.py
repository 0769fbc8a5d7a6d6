"""Which formats a GPU has no arithmetic for."""

from __future__ import annotations

from qurl.quantization.base import QuantizationFormat
from qurl.quantization.fp8 import Fp8
from qurl.quantization.fp8_block import Fp8Block
from qurl.quantization.int8 import Int8

FP8_SINCE = (8, 9)
INT8_BEFORE = (10, 0)
"""CUTLASS has no INT8 products for Blackwell (capability 10 and 12). vLLM 0.32 offers them all the same, and fails at the first
one: https://github.com/vllm-project/vllm/issues/54311. To be removed when vLLM runs INT8 there."""


def lacks(format: QuantizationFormat, capability: tuple[int, int]) -> str:
    """Why a GPU of this compute capability cannot multiply in the format, with what would work; "" where it can.

    Example: lacks(FORMATS["fp8"], (8, 0)) is "needs compute capability 8.9; use quantization=int8"."""
    if isinstance(format, Fp8 | Fp8Block) and capability < FP8_SINCE:
        return "needs compute capability 8.9; use quantization=int8"
    if isinstance(format, Int8) and capability >= INT8_BEFORE:  # Ax-BxP is multiplied as INT8
        return "needs INT8 products, which CUTLASS has below compute capability 10 alone; use quantization=fp8"
    return ""
