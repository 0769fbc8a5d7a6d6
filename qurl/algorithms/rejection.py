"""Which tokens are too far from the policy that sampled them to be trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from qurl.algorithms.masked import MAX_LOG_RATIO
from qurl.algorithms.sequences import sequence_means, sequence_sums
from qurl.config.algorithm import CorrectionConfig, Rejection


def kept_tokens(log_rho: Tensor, mask: Tensor, segment_ids: Tensor, config: CorrectionConfig) -> Tensor:
    """[B, L] bool: the trained tokens whose measure of rho = pi_old / pi_rollout lies in config.rejection_bounds, bounds included.

        token      rho_t                              IcePop's band; verl's rollout_rs=token, token_k1
        sequence   prod_t rho_t                       Seq-MIS; sequence, seq_sum_k1
        geometric  (prod_t rho_t)^(1/T)               Geo-RS; geometric, seq_mean_k1
        k3         mean_t(rho_t - 1 - log rho_t)      K3-RS; seq_mean_k3

    log_rho [B, L], clamped; products are clamped to exp(+-20). What is not a number is kept: the loss must hear of it.
    Raises ValueError for bounds that keep nothing."""
    if config.rejection is Rejection.none:
        return mask
    low, high = config.rejection_bounds
    if not low <= high:
        raise ValueError(
            f"algorithm.correction.rejection_low={low} and rejection_high={high} keep nothing; use e.g. 0.5 and 5 for tokens"
        )
    measure = _measure(config.rejection, log_rho, mask, segment_ids)
    return mask & ~(measure < low) & ~(measure > high)


def _measure(rejection: Rejection, log_rho: Tensor, mask: Tensor, segment_ids: Tensor) -> Tensor:
    if rejection is Rejection.token:
        return log_rho.exp()
    if rejection is Rejection.sequence:
        return sequence_product(log_rho, mask, segment_ids)
    if rejection is Rejection.geometric:
        return sequence_means(log_rho, mask, segment_ids).exp()
    return sequence_means(log_rho.expm1() - log_rho, mask, segment_ids)


def sequence_product(log_rho: Tensor, mask: Tensor, segment_ids: Tensor) -> Tensor:
    """[B, L]: at every position prod_t rho_t over the trained tokens of its sequence, within exp(+-20); 1 on padding."""
    return torch.clamp(sequence_sums(log_rho, mask, segment_ids), -MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
