"""Sums and means over the trained tokens of each sequence, where rows hold several sequences.

Packing puts every sequence into one row of one micro-batch, so what is computed here does not depend on the packing."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_sums(values: Tensor, mask: Tensor, segment_ids: Tensor) -> Tensor:
    """[B, L]: at every position the sum of `values` over the trained tokens of its sequence; added up in float64.

    values, mask [B, L], mask bool; segment_ids [B, L] int64 as in MicroBatch, -1 on padding, where the sum is 0."""
    bins = segment_ids.flatten() + 1
    sums = torch.zeros(bins.numel() + 1, dtype=torch.float64, device=values.device)  # never fewer than there are sequences
    sums = sums.index_add(0, bins, values.masked_fill(~mask, 0.0).flatten().double())
    return sums[bins].view_as(values).to(values.dtype)


def sequence_means(values: Tensor, mask: Tensor, segment_ids: Tensor) -> Tensor:
    """[B, L]: at every position the mean of `values` over the trained tokens of its sequence; 0 where there is none."""
    lengths = sequence_sums(torch.ones_like(values), mask, segment_ids)
    return sequence_sums(values, mask, segment_ids) / lengths.clamp(min=1.0)


def last_trained(mask: Tensor, segment_ids: Tensor) -> Tensor:
    """[B, L] bool: True at the last trained token of each sequence, where a reward for the whole of it is due."""
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    bins = segment_ids.flatten() + 1
    trained = columns.where(mask, -1).flatten()
    last = trained.new_full((bins.numel() + 1,), -1).scatter_reduce(0, bins, trained, "amax")
    return mask & (columns == last[bins].view_as(mask))
