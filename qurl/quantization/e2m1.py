"""The 4-bit numbers E2M1 of OCP's Microscaling formats and of NVFP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from qurl.quantization.packing import look_up, pack
from qurl.quantization.rounding import to_neighbors

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""In order of their codes; bit 3 of a code is the sign."""

LARGEST = 6.0
_CODES_BY_DOUBLE = torch.tensor([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], dtype=torch.uint8)
_VALUES = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)])


def round_to_e2m1(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The E2M1 numbers nearest to x, as float32; ties to the even mantissa, saturating at +-6. NaN stays NaN.

    x: float32. generator: round at random to one of the two neighbors instead, such that the mean is x where |x| <= 6."""
    magnitude = x.abs()
    spacing = 0.5 + 0.5 * (magnitude >= 2.0) + (magnitude >= 4.0)  # 0.5, 1 or 2; an even multiple of it has the even mantissa
    steps = x / spacing
    rounded = steps.round_() if generator is None else to_neighbors(steps, generator)
    return rounded.mul_(spacing).clamp_(-LARGEST, LARGEST)


def pack_e2m1(numbers: Tensor) -> Tensor:
    """E2M1 numbers [..., I], I even -> their codes, uint8 [..., I/2]; -0.0 is a code of its own."""
    codes = _CODES_BY_DOUBLE.to(numbers.device)[(2.0 * numbers).abs().long()]
    return pack(codes | (numbers.signbit().to(torch.uint8) << 3))


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Codes uint8 [..., I/2] -> numbers float32 [..., I]."""
    return look_up(packed, _VALUES)
