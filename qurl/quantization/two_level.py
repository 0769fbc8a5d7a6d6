"""Scales of groups in E4M3 under one float32 scale for all of them: code * group scale / global scale.

The float32 scale is such that the group with the largest number gets E4M3's largest scale."""

from __future__ import annotations

import torch
from torch import Tensor

from qurl.quantization.base import number_like
from qurl.quantization.rounding import E4M3_LARGEST

SMALLEST_E4M3 = 2.0**-9
LARGEST_GLOBAL_SCALE = 2.0**100
"""Keeps all scales normal float32 numbers where amax is next to nothing."""


def global_scale_of(amax: Tensor, largest_code: float) -> Tensor:
    """448 * largest_code / amax, float32; amax: of a whole weight or of each token."""
    return (number_like(largest_code * E4M3_LARGEST, amax) / amax).clamp(max=LARGEST_GLOBAL_SCALE)


def e4m3_scales(amax: Tensor, global_scale: Tensor, largest_code: float, smallest: float) -> Tensor:
    """float8_e4m3fn scales of groups, at least `smallest`; amax: of each group, [..., groups]. NaN where an argument is.

    Divides by a tensor, see qurl.quantization.base.scale_to."""
    return (amax / number_like(largest_code, amax) * global_scale).clamp(min=smallest, max=E4M3_LARGEST).to(torch.float8_e4m3fn)
