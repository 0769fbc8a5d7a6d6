"""The rotation of `quantization.rotation`: blocks of inputs times an orthonormal Hadamard matrix.

H H^T = 1, so x W^T = (x H)(W H)^T: a layer computes the same from rotated weights and rotated activations. What is encoded then is
sums of a block's inputs with all signs. An outlying channel is spread over its block, heavy tails become nearly Gaussian, and the
scale of an array, which its largest number sets, suits the other numbers better.

H is Sylvester's matrix over sqrt(size): symmetric, so it is its own inverse, and its product is log2(size) stages of sums and
differences. Stages go from neighbors to halves of the block, and the factor comes last: kernels add in this order, so that all have
the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

SIZES = (16, 32, 64, 128)
"""Inputs of a block. Longer arrays of any format hold whole blocks, or blocks hold whole arrays."""


def rotate(values: Tensor, size: int) -> Tensor:
    """values [..., I] float32 with every block of `size` inputs multiplied by H; its own inverse up to rounding. I: a multiple of
    size. size: one of SIZES, or 0, which changes nothing."""
    if not size:
        return values
    rotated, half = values, 1
    while half < size:
        first, second = rotated.unflatten(-1, (-1, 2, half)).unbind(-2)
        rotated = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        half *= 2
    return rotated * size**-0.5
