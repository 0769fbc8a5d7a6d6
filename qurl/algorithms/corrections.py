"""What is done about sampling from the quantized policy while optimizing the full-precision one.

Tokens come from pi_rollout (quantized), the clipped surrogate wants pi_old (full precision, same weights). With
rho = pi_old / pi_rollout, R = pi / pi_old and S(R, A, high) = min(R A, clip(R, 1 - clip_low, high) A), per token:

    naive         S(pi / pi_rollout, A, 1 + clip_high)                    eq. 3: clips the mismatch itself; collapses
    none          S(R, A, 1 + clip_high)                                  eq. 1: ignores the mismatch
    decoupled     rho S(R, A, 1 + clip_high)                              eq. 4: unbiased, but rho has no bound
    tis           min(rho, C) S(R, A, 1 + clip_high)                      eq. 5: truncated importance sampling (FlashRL)
    acr           min(rho, C) S(R, A, (1 + clip_high) max(1, rho / C))    eq. 9: adaptive clipping range (QuRL)
    sequence_tis  min(prod_t rho_t, C) S(R, A, 1 + clip_high)             one weight for a response; less bias, more variance
    icepop        rho S(R, A, 1 + clip_high) where rho lies in a band, nothing elsewhere

Equation numbers are QuRL's (arXiv:2602.13953). Truncating the weight of a token with rho > C also shrinks its trust region, seen
from the sampling policy: TIS stops pushing up a good token although the policies have not moved that far. ACR gives exactly those
tokens the room back. The paper writes the upper bound as (1 + clip_high) / r with r = pi_rollout / pi_rollout_truncated; the
closed form r = min(1, C / rho) follows from min(rho, C) = rho r and is a reconstruction, as eqs. 6 and 7 were not available.
The cap `max_clip_scale` on the widening is ours: rho reaches 1e5 in practice, and a bound of 6e4 is none.

Any of them but icepop, which has its own, takes a rejection rule beside it (qurl.algorithms.rejection). In verl's words:

    Token-TIS         rollout_is=token, rollout_is_threshold=C                 name=tis
    Seq-TIS           rollout_is=sequence                                      name=sequence_tis
    IcePop            rollout_is=token, rollout_is_threshold="0.5_5.0"         name=icepop
    Seq-MIS           rollout_is=sequence, rollout_rs=sequence or seq_sum_k1   name=sequence_tis rejection=sequence
    Geo-RS            rollout_rs=geometric or seq_mean_k1                      name=none rejection=geometric
    Geo-RS-Token-TIS  both                                                     name=tis rejection=geometric
                      rollout_is_batch_normalize                               normalize_weights=true"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qurl.algorithms.masked import clamped_log_ratio, token_means
from qurl.algorithms.mismatch import mismatch_metrics
from qurl.algorithms.rejection import kept_tokens, sequence_product
from qurl.config.algorithm import CorrectionConfig, Rejection
from qurl.observability.metrics import Metric


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectionInputs:
    """Tensors [B, L], read without their gradient. Logprobs where mask is False are never read."""

    old_logprobs: Tensor  # nats
    rollout_logprobs: Tensor  # nats
    mask: Tensor  # bool, trained tokens
    segment_ids: Tensor  # int64, which positions are of one sequence, -1 on padding; as in MicroBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """What a policy loss needs to know of the mismatch; tensors [B, L], without gradient."""

    base_logprobs: Tensor  # denominator of the ratio, nats
    weights: Tensor  # >= 0, multiply the surrogate
    clip_high_scale: Tensor  # >= 1, multiplies the upper clip bound
    keep_mask: Tensor  # bool, trained tokens that enter the loss; a subset of the mask. Aggregation still counts the others
    metrics: dict[str, Metric]


def naive(inputs: CorrectionInputs, config: CorrectionConfig) -> Correction:
    """The quantized policy as denominator of the ratio; QuRL eq. 3. A baseline that fails, kept for comparison."""
    return _correction(inputs, config, base_logprobs=inputs.rollout_logprobs)


def none(inputs: CorrectionInputs, config: CorrectionConfig) -> Correction:
    """No correction: samples count as if pi_old had drawn them; QuRL eq. 1."""
    return _correction(inputs, config)


def decoupled(inputs: CorrectionInputs, config: CorrectionConfig) -> Correction:
    """Importance weights rho without truncation; QuRL eq. 4, decoupled PPO (arXiv:2110.00641)."""
    return _correction(inputs, config, weights=_log_rho(inputs).exp())


def tis(inputs: CorrectionInputs, config: CorrectionConfig) -> Correction:
    """Importance weights min(rho, C); QuRL eq. 5, the truncated importance sampling of FlashRL, verl's Token-TIS."""
    return _correction(inputs, config, weights=_log_rho(inputs).exp().clamp(max=config.truncation))


def acr(inputs: CorrectionInputs, config: CorrectionConfig) -> Correction:
    """TIS with the upper clip bound widened by max(1, rho / C), at most `max_clip_scale`; QuRL eq. 9.

    Equal to TIS bit for bit where rho <= C. Raises ValueError for max_clip_scale < 1."""
    if not config.max_clip_scale >= 1:
        raise ValueError(f"algorithm.correction.max_clip_scale={config.max_clip_scale} would narrow the clip range; use >= 1")
    rho = _log_rho(inputs).exp()
    scale = (rho / config.truncation).clamp(min=1.0, max=config.max_clip_scale)
    correction = _correction(inputs, config, weights=rho.clamp(max=config.truncation), clip_high_scale=scale)
    correction.metrics.update(token_means(inputs.mask, {"acr/widened_fraction": scale > 1.0}))
    return correction


def sequence_tis(inputs: CorrectionInputs, config: CorrectionConfig) -> Correction:
    """One importance weight min(prod_t rho_t, C) for all tokens of a response; verl's Seq-TIS.

    The product is the exact weight of a response where tis weighs each token alone; over long responses it leaves few of them."""
    product = sequence_product(_log_rho(inputs), inputs.mask, inputs.segment_ids)
    return _correction(inputs, config, weights=product.clamp(max=config.truncation))


def icepop(inputs: CorrectionInputs, config: CorrectionConfig) -> Correction:
    """Importance weights rho, and no gradient from tokens whose rho is out of [rejection_low, rejection_high], by default [0.5, 5].

    decoupled with rejection=token. Raises ValueError for another rejection. Ling team 2025 (arXiv:2510.18855)."""
    if config.rejection not in (Rejection.none, Rejection.token):
        raise ValueError(
            f"algorithm.correction.rejection={config.rejection.name} with name=icepop, which rejects tokens; use name=decoupled"
        )
    return decoupled(inputs, replace(config, rejection=Rejection.token))


def _log_rho(inputs: CorrectionInputs) -> Tensor:
    """log(pi_old / pi_rollout) within +-20, 0 where masked, without gradient; [B, L]."""
    return clamped_log_ratio(inputs.old_logprobs.detach(), inputs.rollout_logprobs.detach(), inputs.mask)


def _correction(
    inputs: CorrectionInputs,
    config: CorrectionConfig,
    *,
    base_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    clip_high_scale: Tensor | None = None,
) -> Correction:
    """Fill what a correction leaves alone: base old, weights 1, scale 1, every trained token kept that the rejection rule keeps."""
    if not config.truncation > 0:
        raise ValueError(f"algorithm.correction.truncation={config.truncation} must be positive; FlashRL uses 2 and 8")
    mask = inputs.mask
    base = (inputs.old_logprobs if base_logprobs is None else base_logprobs).detach()
    ones = torch.ones_like(base, dtype=torch.promote_types(base.dtype, torch.float32))
    keep_mask = kept_tokens(_log_rho(inputs), mask, inputs.segment_ids, config)
    metrics = mismatch_metrics(inputs.old_logprobs, inputs.rollout_logprobs, mask, config.truncation)
    if config.rejection is not Rejection.none:
        metrics.update(token_means(mask, {"mismatch/rejected_fraction": mask & ~keep_mask}))
    return Correction(
        base_logprobs=base.masked_fill(~mask, 0.0),
        weights=ones if weights is None else weights.where(mask, 1.0),
        clip_high_scale=ones if clip_high_scale is None else clip_high_scale,
        keep_mask=keep_mask,
        metrics=metrics,
    )


CorrectionFn = Callable[[CorrectionInputs, CorrectionConfig], Correction]

CORRECTIONS: dict[str, CorrectionFn] = {
    "naive": naive,
    "none": none,
    "decoupled": decoupled,
    "tis": tis,
    "acr": acr,
    "sequence_tis": sequence_tis,
    "icepop": icepop,
}
