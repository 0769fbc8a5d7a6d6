"""Per-token estimates of KL(current || reference), to be added to the loss.

An estimator's value and its gradient are two matters. Tokens are samples, so the expectation of the autograd gradient is not
the gradient of the expectation: for x = log pi - log pi_ref and g = grad log pi, E[g] = 0 under the current policy, and

    k1  x                     value unbiased; autograd gives g, mean 0: no regularization at all. We give it the gradient x g
    k2  x^2 / 2               value biased, low variance; gradient x g, mean grad KL(current || ref)
    k3  exp(-x) - 1 + x       value unbiased, >= 0; gradient (1 - exp(-x)) g, mean grad KL(ref || current). GRPO's, DeepScaleR's

All three pull to the reference and agree to second order near it. Values: Schulman, "Approximating KL divergence"."""

from __future__ import annotations

from torch import Tensor

from qurl.algorithms.masked import clamped_log_ratio
from qurl.config.algorithm import KLEstimator


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: KLEstimator) -> Tensor:
    """KL(current || reference) per token in nats; [B, L], 0 where masked, gradient to logprobs only.

    logprobs, ref_logprobs: [B, L] nats of the sampled tokens. mask: [B, L] bool. The log ratio is clamped to +-20."""
    log_ratio = clamped_log_ratio(logprobs, ref_logprobs.detach(), mask)
    if estimator is KLEstimator.k3:
        return (-log_ratio).expm1() + log_ratio
    k2 = 0.5 * log_ratio.square()
    if estimator is KLEstimator.k2:
        return k2
    return log_ratio.detach() + (k2 - k2.detach())
