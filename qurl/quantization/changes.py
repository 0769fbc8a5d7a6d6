"""How much of the quantized policy one training step moves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qurl.quantization.packing import is_packed


def is_code(name: str, tensor: Tensor) -> bool:
    """Whether a wire tensor, by its name, holds codes; scales and unquantized tensors do not."""
    return name.rpartition(".")[2] == "weight" and tensor.element_size() == 1


def num_codes(codes: Tensor) -> int:
    """Codes in a tensor of codes."""
    return codes.numel() * (2 if is_packed(codes) else 1)


def count_changed_codes(previous: Tensor, current: Tensor) -> Tensor:
    """Codes whose bits differ in two tensors of codes of the same shape, dtype and device; a number on that device."""
    difference = previous.view(torch.uint8) ^ current.view(torch.uint8)
    if is_packed(current):
        return (difference & 15).count_nonzero() + (difference >> 4).count_nonzero()
    return difference.count_nonzero()


def num_changed_codes(previous: Tensor, current: Tensor) -> int:
    """count_changed_codes on the host."""
    return int(count_changed_codes(previous, current))


def changed_codes(previous: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> tuple[int, int]:
    """(codes whose bits differ, codes) over the code tensors of two versions of the same wire tensors, keyed by name.

    Raises ValueError where the versions differ in names, shapes or dtypes."""
    if previous.keys() != current.keys():
        raise ValueError(f"the two versions do not both hold {sorted(previous.keys() ^ current.keys())[:4]}")
    changed = total = 0
    for name, new in current.items():
        old = previous[name]
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(f"{name} was {old.dtype} {tuple(old.shape)} and is {new.dtype} {tuple(new.shape)}")
        if is_code(name, new):
            changed += num_changed_codes(old, new)
            total += num_codes(new)
    return changed, total
