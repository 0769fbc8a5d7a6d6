"""Log ratios and means over the trained tokens only; what lies under the mask may be anything, NaN included."""

from __future__ import annotations

import torch
from torch import Tensor

from qurl.observability.metrics import Mean

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far outside of any sound ratio, and its square is still finite in float32


def clamped_log_ratio(numerator: Tensor, denominator: Tensor, mask: Tensor) -> Tensor:
    """numerator - denominator in at least float32, clamped to +-20; 0 where masked, in value and gradient.

    Logprobs [B, L] in nats, mask [B, L] bool. A NaN at a trained token stays NaN: hiding it would hide a broken model."""
    dtype = torch.promote_types(torch.promote_types(numerator.dtype, denominator.dtype), torch.float32)
    difference = numerator.to(dtype).masked_fill(~mask, 0.0) - denominator.to(dtype).masked_fill(~mask, 0.0)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def token_means(mask: Tensor, values: dict[str, Tensor]) -> dict[str, Mean]:
    """The mean of each [B, L] tensor over the trained tokens, weighted by their number; one device synchronization in all.

    Without trained tokens every mean is 0 with weight 0."""
    sums = torch.stack([mask.sum().double(), *(v.detach().masked_fill(~mask, 0).sum(dtype=torch.float64) for v in values.values())])
    num_tokens, *totals = sums.tolist()
    return {key: Mean(total / max(num_tokens, 1.0), weight=num_tokens) for key, total in zip(values, totals, strict=True)}
