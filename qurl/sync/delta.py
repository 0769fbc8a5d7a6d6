"""What changed between two versions of a tensor, bit by bit.

An RL step moves few codes, so positions and values of those can be far smaller than the tensor. Positions are int32, hence
tensors of 2^31 elements and more always travel whole."""

from __future__ import annotations

import torch
from torch import Tensor

POSITION_BYTES = 4
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def num_changes(previous: Tensor, current: Tensor) -> int:
    """Elements whose bits differ; NaN equals itself, -0.0 does not equal 0.0."""
    return int((_bits(previous) != _bits(current)).sum())


def is_smaller_as_delta(tensor: Tensor, changes: int) -> bool:
    """Whether positions and values of `changes` elements take fewer bytes than the tensor."""
    return tensor.numel() < 2**31 and changes * (POSITION_BYTES + tensor.element_size()) < tensor.nbytes


def find_changes(previous: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [k] int32 in the flattened tensor, ascending, and new values [k] in its dtype."""
    new = _bits(current)
    positions = (_bits(previous) != new).nonzero().flatten()
    return positions.to(torch.int32), new[positions].view(current.dtype)


def apply_changes(base: Tensor, positions: Tensor, values: Tensor) -> None:
    """Write the changes into `base`, contiguous. Raises IndexError for a position outside of it."""
    _bits(base)[positions.to(torch.int64)] = _bits(values)


def _bits(tensor: Tensor) -> Tensor:
    """The elements as integers of the same size, flattened."""
    return tensor.reshape(-1).view(_BITS[tensor.element_size()])
