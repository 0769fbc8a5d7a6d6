"""Per-token policy losses; the caller aggregates with `token_weights`.

    ppo_clip  -w min(R A, clip(R, 1 - clip_low, high) A)          R = pi / pi_base of the token; a clipped token has no gradient
    gspo      the same with R of the whole response               R = (prod_t pi_t / pi_base_t)^(1/T)
    cispo     -w clip(R, 1 - clip_low, high) A log pi             no gradient through the ratio, so every token keeps one

with high = (1 + clip_high) * clip_high_scale, where scale and w come from the correction. log R is clamped to +-20."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qurl.algorithms.masked import clamped_log_ratio, token_means
from qurl.algorithms.sequences import sequence_means
from qurl.config.algorithm import PolicyLossConfig
from qurl.observability.metrics import Mean, Metric


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLossInputs:
    """Tensors [B, L]; only logprobs carries gradient. Values where mask is False are never read."""

    logprobs: Tensor  # nats, policy being optimized
    base_logprobs: Tensor  # nats, denominator of the ratio
    advantages: Tensor
    mask: Tensor  # bool, Correction.keep_mask
    weights: Tensor  # >= 0
    clip_high_scale: Tensor  # >= 1
    segment_ids: Tensor  # int64, which positions are of one sequence, -1 on padding; as in MicroBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """A loss to be minimized."""

    loss: Tensor  # [B, L] at least float32, 0 where masked
    metrics: dict[str, Metric]


def ppo_clip(inputs: PolicyLossInputs, config: PolicyLossConfig) -> LossOutput:
    """-weight * min(R A, clip(R, 1 - clip_low, (1 + clip_high) * clip_high_scale) A) with R = pi / pi_base.

    PPO (arXiv:1707.06347 eq. 7) with asymmetric bounds (DAPO, arXiv:2503.14476 eq. 10), the upper one widened per token by ACR
    (QuRL eq. 9). dual_clip c bounds the surrogate of A < 0 from below by c A (arXiv:1912.09729 eq. 5).
    Raises ValueError for bounds that make no sense."""
    return _clipped_surrogate(inputs, config, _log_ratio(inputs))


def gspo(inputs: PolicyLossInputs, config: PolicyLossConfig) -> LossOutput:
    """ppo_clip with R the geometric mean over the response's tokens that are not masked: a response is clipped as a whole.

    Token form (GSPO-token): the value is the response's ratio, the gradient A w R grad log pi of each token. With one advantage
    and one weight for the response and aggregation=sequence_mean that is GSPO's gradient. The paper's bounds are clip_low=3e-4
    and clip_high=4e-4. Zheng et al. 2025 (arXiv:2507.18071). Raises ValueError as ppo_clip."""
    log_ratio = _log_ratio(inputs)
    of_response = sequence_means(log_ratio.detach(), inputs.mask, inputs.segment_ids).masked_fill(~inputs.mask, 0.0)
    return _clipped_surrogate(inputs, config, of_response + (log_ratio - log_ratio.detach()))


def cispo(inputs: PolicyLossInputs, config: PolicyLossConfig) -> LossOutput:
    """-weight * stop_gradient(clip(R, 1 - clip_low, (1 + clip_high) * clip_high_scale)) A log pi.

    The widened bound is for A > 0 alone, as where ACR was derived. The value is that of a policy gradient, not of a surrogate; with
    clip_low=1 there is no lower bound, as in the paper. MiniMax 2025 (arXiv:2506.13585) eqs. 4 and 5.
    Raises ValueError for bounds that make no sense, and for dual_clip, which bounds a surrogate."""
    if config.dual_clip is not None:
        raise ValueError(f"algorithm.policy_loss.dual_clip={config.dual_clip} does nothing with name=cispo; use null")
    token = _Tokens(inputs, config, _log_ratio(inputs).detach())
    high = token.high.where(token.positive, token.plain_high)
    bounded = token.ratio.minimum(high).clamp(min=token.low)
    logprobs = inputs.logprobs.to(bounded.dtype).masked_fill(~inputs.mask, 0.0)
    loss = -token.weights * bounded * token.advantages * logprobs
    metrics = token_means(inputs.mask, {
        "policy/loss": loss,
        "policy/clip_high_fraction": token.ratio > high,
        "policy/clip_low_fraction": token.ratio < token.low,
        "policy/kl_old_current": token.log_ratio.expm1() - token.log_ratio,
    })
    changed = token.positive & (token.ratio > token.plain_high) & (high > token.plain_high)
    gradient = token.weights * token.advantages * bounded
    return LossOutput(loss=loss, metrics={**metrics, **_acr_metrics(inputs.mask, changed, gradient)})


class _Tokens:
    """What the losses share, [B, L]: ratio, its bounds, and what multiplies it; neutral where masked."""

    def __init__(self, inputs: PolicyLossInputs, config: PolicyLossConfig, log_ratio: Tensor):
        _check(config)
        self.log_ratio = log_ratio
        self.ratio = log_ratio.exp()
        dtype, masked = self.ratio.dtype, ~inputs.mask
        self.advantages = inputs.advantages.detach().to(dtype).masked_fill(masked, 0.0)
        self.weights = inputs.weights.detach().to(dtype).masked_fill(masked, 0.0)
        self.low, self.plain_high = 1.0 - config.clip_low, 1.0 + config.clip_high
        self.high = self.plain_high * inputs.clip_high_scale.detach().to(dtype).masked_fill(masked, 1.0)
        self.positive, self.negative = self.advantages > 0, self.advantages < 0


def _log_ratio(inputs: PolicyLossInputs) -> Tensor:
    return clamped_log_ratio(inputs.logprobs, inputs.base_logprobs.detach(), inputs.mask)


def _clipped_surrogate(inputs: PolicyLossInputs, config: PolicyLossConfig, log_ratio: Tensor) -> LossOutput:
    """See ppo_clip; log_ratio [B, L] of log R with the gradient it shall have."""
    token = _Tokens(inputs, config, log_ratio)
    ratio, advantages, high = token.ratio, token.advantages, token.high
    clipped = torch.where(ratio > high, high, ratio).clamp(min=token.low)  # torch.minimum would halve the gradient at ratio == high
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if config.dual_clip is not None:
        surrogate = torch.where(token.negative, torch.maximum(surrogate, config.dual_clip * advantages), surrogate)
    loss = -token.weights * surrogate
    cut_high, cut_low = token.positive & (ratio > high), token.negative & (ratio < token.low)
    without_gradient = cut_high | cut_low
    of_token = _log_ratio(inputs).detach()
    measured = {
        "policy/loss": loss,
        "policy/clip_high_fraction": cut_high,
        "policy/clip_low_fraction": cut_low,
        "policy/kl_old_current": of_token.expm1() - of_token,
    }
    if config.dual_clip is not None:
        measured["policy/dual_clip_fraction"] = token.negative & (ratio > config.dual_clip)
        without_gradient = without_gradient | measured["policy/dual_clip_fraction"]
    changed = token.positive & (ratio > token.plain_high) & (ratio <= high)
    gradient = (token.weights * advantages * ratio).masked_fill(without_gradient, 0.0)
    return LossOutput(loss=loss, metrics={**token_means(inputs.mask, measured), **_acr_metrics(inputs.mask, changed, gradient)})


def _acr_metrics(mask: Tensor, changed: Tensor, gradient: Tensor) -> dict[str, Metric]:
    """How many tokens a widened bound changed, and their share of sum |gradient|.

    gradient [B, L]: of the loss by each token's logprob, up to the sign and before aggregation."""
    size = gradient.abs()
    means = token_means(mask, {"changed": changed, "theirs": size.masked_fill(~changed, 0.0), "all": size})
    theirs, everyone = means["theirs"].value, means["all"].value
    return {
        "acr/changed_fraction": means["changed"],
        "acr/changed_gradient_fraction": Mean(theirs / everyone if everyone else 0.0, weight=everyone * means["all"].weight),
    }


def _check(config: PolicyLossConfig) -> None:
    if not 0 <= config.clip_low <= 1:
        raise ValueError(f"algorithm.policy_loss.clip_low={config.clip_low} is a distance below a ratio of 1; use 0 to 1")
    if not config.clip_high >= 0:
        raise ValueError(f"algorithm.policy_loss.clip_high={config.clip_high} is a distance above a ratio of 1; use >= 0")
    if config.dual_clip is not None and not config.dual_clip > 1:
        raise ValueError(f"algorithm.policy_loss.dual_clip={config.dual_clip} bounds the ratio for A < 0; use > 1 or null")


PolicyLossFn = Callable[[PolicyLossInputs, PolicyLossConfig], LossOutput]

POLICY_LOSSES: dict[str, PolicyLossFn] = {"ppo_clip": ppo_clip, "gspo": gspo, "cispo": cispo}
