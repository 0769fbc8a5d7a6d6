"""A 64-bit number for the bytes of a tensor, to catch what transfers and bookkeeping do to weights by accident.

Each 32-bit word is multiplied by an odd 64-bit constant of its position; the products are added modulo 2^64 over chunks, and the
chunk sums are chained through a bijection. Odd factors and bijections let no single wrong word cancel. Words that are wrong in
several places, or swapped, cancel with a chance of about 2^-32 (multiply-shift hashing: Dietzfelbinger et al. 1997), because
the products keep 32 bits more than the words. It is no defense against somebody who wants a collision.

The arithmetic is exact and the same on every device. Chunks keep temporaries at half a megabyte on the CPU."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

CHUNK_WORDS = 1 << 16
ROWS_PER_BLOCK_CUDA = 256  # chunks summed by one kernel: 128 MiB of temporaries
MASK = (1 << 64) - 1


def fingerprint(tensor: Tensor) -> int:
    """Signed 64-bit fingerprint of the tensor's bytes in row-major order; any dtype, device and strides.

    Depends on every bit, its position and the number of bytes, not on dtype, shape or name. Not differentiable."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.storage_offset() % 4:
        raw = raw.clone()  # 32-bit words must start at a multiple of 4
    state = _mix(raw.numel())
    for chunk_sum in _chunk_sums(raw):
        state = _mix(state ^ (chunk_sum & MASK))
    return state - (1 << 64) if state >> 63 else state


def _chunk_sums(raw: Tensor) -> list[int]:
    """Sum of word times multiplier modulo 2^64 of each chunk of the bytes; the last chunk is padded with zeros."""
    multipliers = _multipliers(raw.device)
    chunk_bytes = 4 * CHUNK_WORDS
    whole = raw.numel() // chunk_bytes * chunk_bytes
    rows = raw[:whole].view(torch.int32).view(-1, CHUNK_WORDS)
    step = ROWS_PER_BLOCK_CUDA if raw.is_cuda else 1
    scratch = torch.empty(min(step, len(rows)), CHUNK_WORDS, dtype=torch.int64, device=raw.device)
    sums = []
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        products = scratch[: len(block)].copy_(block).mul_(multipliers)
        sums.append(products.sum(dim=1))
    if whole < raw.numel():
        tail = raw.new_zeros((raw.numel() - whole + 3) // 4 * 4)
        tail[: raw.numel() - whole] = raw[whole:]
        words = tail.view(torch.int32).to(torch.int64)
        sums.append((words * multipliers[: len(words)]).sum().unsqueeze(0))
    return torch.cat(sums).tolist() if sums else []


@lru_cache(maxsize=16)
def _multipliers(device: torch.device) -> Tensor:
    """Odd int64 [CHUNK_WORDS], the same on every device (splitmix64 of the position)."""
    values = [_mix(position * 0x9E3779B97F4A7C15) | 1 for position in range(1, CHUNK_WORDS + 1)]
    return torch.tensor([v - (1 << 64) if v >> 63 else v for v in values], dtype=torch.int64, device=device)


def _mix(state: int) -> int:
    """splitmix64's finalizer (Steele et al. 2014), a bijection of 64-bit words; `state` is taken modulo 2^64."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)
