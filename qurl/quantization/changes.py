"""How much of the quantized policy one training step moves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def is_code(tensor: Tensor) -> bool:
    """Whether a wire tensor holds codes (one byte each); scales and unquantized tensors do not."""
    return tensor.element_size() == 1


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
        if is_code(new):
            changed += int((old.view(torch.uint8) != new.view(torch.uint8)).sum())
            total += new.numel()
    return changed, total
