"""What a critic minimizes."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """(loss per token, tokens whose gradient the clip took), both [B, L], 0 and False where mask is False.

        1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)

    values: the critic's now, with gradient; old_values: those that the returns were computed from. mask [B, L] bool. clip > 0, in
    units of the reward; None: the plain square. OpenAI's ppo2, not in its paper (arXiv:1707.06347); verl's compute_value_loss."""
    values, old_values, returns = (x.masked_fill(~mask, 0.0) for x in (values, old_values.detach(), returns.detach()))
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain, torch.zeros_like(mask)
    clipped = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return 0.5 * torch.maximum(plain, clipped), clipped > plain
