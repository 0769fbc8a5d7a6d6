"""Per-token policy losses; the caller aggregates with `token_weights`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qurl.algorithms.masked import clamped_log_ratio, token_means
from qurl.config.algorithm import PolicyLossConfig
from qurl.observability.metrics import Metric


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLossInputs:
    """Tensors [B, L]; only logprobs carries gradient. Values where mask is False are never read."""

    logprobs: Tensor  # nats, policy being optimized
    base_logprobs: Tensor  # nats, denominator of the ratio
    advantages: Tensor
    mask: Tensor  # bool, Correction.keep_mask
    weights: Tensor  # >= 0
    clip_high_scale: Tensor  # >= 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """A loss to be minimized."""

    loss: Tensor  # [B, L] at least float32, 0 where masked
    metrics: dict[str, Metric]


def ppo_clip(inputs: PolicyLossInputs, config: PolicyLossConfig) -> LossOutput:
    """-weight * min(R A, clip(R, 1 - clip_low, (1 + clip_high) * clip_high_scale) A) with R = pi / pi_base.

    PPO (arXiv:1707.06347 eq. 7) with asymmetric bounds (DAPO, arXiv:2503.14476 eq. 10), the upper one widened per token by ACR
    (QuRL eq. 9). dual_clip c bounds the surrogate of A < 0 from below by c A (arXiv:1912.09729 eq. 5). log R is clamped to +-20.
    Raises ValueError for bounds that make no sense."""
    _check(config)
    mask = inputs.mask
    log_ratio = clamped_log_ratio(inputs.logprobs, inputs.base_logprobs.detach(), mask)
    ratio = log_ratio.exp()
    advantages = inputs.advantages.detach().to(ratio.dtype).masked_fill(~mask, 0.0)
    weights = inputs.weights.detach().to(ratio.dtype).masked_fill(~mask, 0.0)
    low, plain_high = 1.0 - config.clip_low, 1.0 + config.clip_high
    high = plain_high * inputs.clip_high_scale.detach().to(ratio.dtype).masked_fill(~mask, 1.0)
    clipped = torch.where(ratio > high, high, ratio).clamp(min=low)  # torch.minimum would halve the gradient at ratio == high
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if config.dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, config.dual_clip * advantages), surrogate)
    loss = -weights * surrogate
    positive, negative = advantages > 0, advantages < 0
    measured = {
        "policy/loss": loss,
        "policy/clip_high_fraction": positive & (ratio > high),
        "policy/clip_low_fraction": negative & (ratio < low),
        "policy/kl_old_current": log_ratio.expm1() - log_ratio,
        "acr/changed_fraction": positive & (ratio > plain_high) & (ratio <= high),
    }
    if config.dual_clip is not None:
        measured["policy/dual_clip_fraction"] = negative & (ratio > config.dual_clip)
    return LossOutput(loss=loss, metrics=dict(token_means(mask, measured)))


def _check(config: PolicyLossConfig) -> None:
    if not 0 <= config.clip_low <= 1:
        raise ValueError(f"algorithm.policy_loss.clip_low={config.clip_low} is a distance below a ratio of 1; use 0 to 1")
    if not config.clip_high >= 0:
        raise ValueError(f"algorithm.policy_loss.clip_high={config.clip_high} is a distance above a ratio of 1; use >= 0")
    if config.dual_clip is not None and not config.dual_clip > 1:
        raise ValueError(f"algorithm.policy_loss.dual_clip={config.dual_clip} bounds the ratio for A < 0; use > 1 or null")


PolicyLossFn = Callable[[PolicyLossInputs, PolicyLossConfig], LossOutput]

POLICY_LOSSES: dict[str, PolicyLossFn] = {"ppo_clip": ppo_clip}
