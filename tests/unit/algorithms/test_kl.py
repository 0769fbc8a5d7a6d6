import math

import pytest
import torch

from qurl.algorithms import kl_penalty
from qurl.config import KLEstimator

FORMULAS = {
    KLEstimator.k1: lambda x: x,
    KLEstimator.k2: lambda x: x * x / 2,
    KLEstimator.k3: lambda x: math.exp(-x) - 1 + x,
}


@pytest.mark.parametrize("estimator", list(KLEstimator))
def test_values_follow_the_formulas(estimator):
    x = torch.tensor([[-1.5, 0.0, 0.3, 2.0]], dtype=torch.float64)
    values = kl_penalty(x - 2, torch.full_like(x, -2.0), torch.ones_like(x, dtype=torch.bool), estimator)
    assert values.tolist() == [pytest.approx([FORMULAS[estimator](v) for v in x[0].tolist()], abs=1e-12)]


@pytest.mark.parametrize("estimator", list(KLEstimator))
def test_the_expected_gradient_is_that_of_the_divergence_named(estimator):
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.0, 0.5, -0.2, 0.1], dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    penalty = kl_penalty(logprobs[None], ref[None], torch.ones(1, 4, dtype=torch.bool), estimator)[0]
    (expected,) = torch.autograd.grad((logprobs.exp().detach() * penalty).sum(), logits, retain_graph=True)
    if estimator is KLEstimator.k3:
        divergence = (ref.exp() * (ref - logprobs)).sum()  # KL(ref || current)
    else:
        divergence = (logprobs.exp() * (logprobs - ref)).sum()  # KL(current || ref)
    assert torch.allclose(expected, torch.autograd.grad(divergence, logits)[0], atol=1e-12)


@pytest.mark.parametrize("estimator", [KLEstimator.k1, KLEstimator.k3])
def test_the_expected_value_is_the_divergence(estimator):
    logprobs = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64).log_softmax(0)
    ref = torch.tensor([0.0, 0.5, -0.2, 0.1], dtype=torch.float64).log_softmax(0)
    values = kl_penalty(logprobs[None], ref[None], torch.ones(1, 4, dtype=torch.bool), estimator)[0]
    assert (logprobs.exp() * values).sum().item() == pytest.approx((logprobs.exp() * (logprobs - ref)).sum().item(), abs=1e-12)


@pytest.mark.parametrize("estimator", list(KLEstimator))
def test_masked_and_extreme_tokens_are_harmless(estimator):
    logprobs = torch.tensor([[math.nan, -1e4, 0.0]], requires_grad=True)
    ref = torch.tensor([[math.nan, 0.0, -1e4]], requires_grad=True)
    mask = torch.tensor([[False, True, True]])
    penalty = kl_penalty(logprobs, ref, mask, estimator)
    penalty.sum().backward()
    assert penalty[0, 0] == 0 and penalty.isfinite().all()
    assert logprobs.grad[0, 0] == 0 and logprobs.grad.isfinite().all() and ref.grad is None
