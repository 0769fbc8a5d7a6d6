"""What is done about sampling from the quantized policy while optimizing the full-precision one.

Tokens come from pi_rollout (quantized), the clipped surrogate wants pi_old (full precision, same weights). With
rho = pi_old / pi_rollout, R = pi / pi_old and S(R, A, high) = min(R A, clip(R, 1 - clip_low, high) A), per token:

    naive      S(pi / pi_rollout, A, 1 + clip_high)                    eq. 3: clips the mismatch itself; collapses
    none       S(R, A, 1 + clip_high)                                  eq. 1: ignores the mismatch
    decoupled  rho S(R, A, 1 + clip_high)                              eq. 4: unbiased, but rho has no bound
    tis        min(rho, C) S(R, A, 1 + clip_high)                      eq. 5: truncated importance sampling (FlashRL)
    acr        min(rho, C) S(R, A, (1 + clip_high) max(1, rho / C))    eq. 9: adaptive clipping range (QuRL)

Equation numbers are QuRL's (arXiv:2602.13953). Truncating the weight of a token with rho > C also shrinks its trust region, seen
from the sampling policy: TIS stops pushing up a good token although the policies have not moved that far. ACR gives exactly those
tokens the room back. The paper writes the upper bound as (1 + clip_high) / r with r = pi_rollout / pi_rollout_truncated; the
closed form r = min(1, C / rho) follows from min(rho, C) = rho r and is a reconstruction, as eqs. 6 and 7 were not available.
The cap `max_clip_scale` on the widening is ours: rho reaches 1e5 in practice, and a bound of 6e4 is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qurl.algorithms.masked import clamped_log_ratio, token_means
from qurl.algorithms.mismatch import mismatch_metrics
from qurl.config.algorithm import CorrectionConfig
from qurl.observability.metrics import Metric


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """What a policy loss needs to know of the mismatch; tensors [B, L], without gradient."""

    base_logprobs: Tensor  # denominator of the ratio, nats
    weights: Tensor  # >= 0, multiply the surrogate
    clip_high_scale: Tensor  # >= 1, multiplies the upper clip bound
    keep_mask: Tensor  # bool, trained tokens that enter the loss; a subset of the mask. Aggregation still counts the others
    metrics: dict[str, Metric]


def naive(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, config: CorrectionConfig) -> Correction:
    """The quantized policy as denominator of the ratio; QuRL eq. 3. A baseline that fails, kept for comparison."""
    return _correction(old_logprobs, rollout_logprobs, mask, config, base_logprobs=rollout_logprobs)


def none(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, config: CorrectionConfig) -> Correction:
    """No correction: samples count as if pi_old had drawn them; QuRL eq. 1."""
    return _correction(old_logprobs, rollout_logprobs, mask, config)


def decoupled(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, config: CorrectionConfig) -> Correction:
    """Importance weights rho without truncation; QuRL eq. 4, decoupled PPO (arXiv:2110.00641)."""
    return _correction(old_logprobs, rollout_logprobs, mask, config, weights=_rho(old_logprobs, rollout_logprobs, mask))


def tis(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, config: CorrectionConfig) -> Correction:
    """Importance weights min(rho, C); QuRL eq. 5, the truncated importance sampling of FlashRL."""
    weights = _rho(old_logprobs, rollout_logprobs, mask).clamp(max=config.truncation)
    return _correction(old_logprobs, rollout_logprobs, mask, config, weights=weights)


def acr(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, config: CorrectionConfig) -> Correction:
    """TIS with the upper clip bound widened by max(1, rho / C), at most `max_clip_scale`; QuRL eq. 9.

    Equal to TIS bit for bit where rho <= C. Raises ValueError for max_clip_scale < 1."""
    if not config.max_clip_scale >= 1:
        raise ValueError(f"algorithm.correction.max_clip_scale={config.max_clip_scale} would narrow the clip range; use >= 1")
    rho = _rho(old_logprobs, rollout_logprobs, mask)
    scale = (rho / config.truncation).clamp(min=1.0, max=config.max_clip_scale)
    correction = _correction(
        old_logprobs, rollout_logprobs, mask, config, weights=rho.clamp(max=config.truncation), clip_high_scale=scale
    )
    correction.metrics.update(token_means(mask, {"acr/widened_fraction": scale > 1.0}))
    return correction


def _rho(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """pi_old / pi_rollout within exp(+-20), 1 where masked, without gradient; [B, L]."""
    return clamped_log_ratio(old_logprobs.detach(), rollout_logprobs.detach(), mask).exp()


def _correction(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    config: CorrectionConfig,
    *,
    base_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    clip_high_scale: Tensor | None = None,
) -> Correction:
    """Fill what a correction leaves alone: base old, weights 1, scale 1, every trained token kept."""
    if not config.truncation > 0:
        raise ValueError(f"algorithm.correction.truncation={config.truncation} must be positive; FlashRL uses 2 and 8")
    base = (old_logprobs if base_logprobs is None else base_logprobs).detach()
    ones = torch.ones_like(base, dtype=torch.promote_types(base.dtype, torch.float32))
    return Correction(
        base_logprobs=base.masked_fill(~mask, 0.0),
        weights=ones if weights is None else weights,
        clip_high_scale=ones if clip_high_scale is None else clip_high_scale,
        keep_mask=mask,
        metrics=mismatch_metrics(old_logprobs, rollout_logprobs, mask, config.truncation),
    )


CorrectionFn = Callable[[Tensor, Tensor, Tensor, CorrectionConfig], Correction]

CORRECTIONS: dict[str, CorrectionFn] = {"naive": naive, "none": none, "decoupled": decoupled, "tis": tis, "acr": acr}
