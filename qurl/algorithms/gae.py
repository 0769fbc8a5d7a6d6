"""Advantages from a critic: generalized advantage estimation over packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, segment_ids: Tensor, *, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns = advantages + values), [B, L] without gradient, 0 where mask is False.

        A_t = delta_t + discount * gae_lambda * A_t'        delta_t = r_t + discount * V_t' - V_t

    t' is the next trained token of the same sequence; after the last one A and V are 0. rewards: of the token at t, the outcome on
    the last one. values: the critic's for the state before the token at t. mask [B, L] bool; segment_ids [B, L] as in MicroBatch.
    Raises ValueError for a discount or gae_lambda outside of [0, 1]. Schulman et al. 2016 (arXiv:1506.02438) eq. 16."""
    for name, number in (("discount", discount), ("gae_lambda", gae_lambda)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name}={number} must lie in [0, 1]; PPO for language models uses 1.0")
    rewards, values = (x.detach().masked_fill(~mask, 0.0) for x in (rewards, values))
    advantages = torch.zeros_like(values)
    next_value, next_advantage = values.new_zeros(len(values)), values.new_zeros(len(values))
    next_segment = segment_ids.new_full((len(values),), -1)
    for t in reversed(range(values.shape[1])):
        continues = segment_ids[:, t] == next_segment
        next_value, next_advantage = (x.where(continues, 0.0) for x in (next_value, next_advantage))
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantages[:, t] = (delta + discount * gae_lambda * next_advantage).masked_fill(~mask[:, t], 0.0)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantages[:, t], next_advantage)
        next_segment = segment_ids[:, t]
    return advantages, advantages + values
