import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qurl.algorithms import CORRECTIONS, PolicyLossInputs, ppo_clip, token_weights
from qurl.config import Aggregation, CorrectionConfig, PolicyLossConfig
from qurl.observability.metrics import reduce_metrics


def inputs(ratio, advantages, rho, correction="acr", mask=None, truncation=2.0, dtype=torch.float64):
    """A batch with the given R = pi / pi_old and rho = pi_old / pi_rollout."""
    ratio, advantages, rho = (torch.atleast_2d(torch.as_tensor(x, dtype=dtype)) for x in (ratio, advantages, rho))
    mask = torch.ones_like(ratio, dtype=torch.bool) if mask is None else mask
    old = torch.full_like(ratio, -1.0)
    c = CORRECTIONS[correction](old, old - rho.log(), mask, CorrectionConfig(truncation=truncation, max_clip_scale=10.0))
    logprobs = (old + ratio.log()).detach().requires_grad_()
    return PolicyLossInputs(logprobs=logprobs, base_logprobs=c.base_logprobs, advantages=advantages, mask=c.keep_mask,
                            weights=c.weights, clip_high_scale=c.clip_high_scale)


def loss_and_gradient(x, config=None):
    loss = ppo_clip(x, config or PolicyLossConfig()).loss
    (gradient,) = torch.autograd.grad(loss.sum(), x.logprobs)
    return loss.detach(), gradient


def random_case(shape=(12, 15), seed=0):
    g = torch.Generator().manual_seed(seed)
    ratio = torch.randn(shape, generator=g, dtype=torch.float64).mul(0.5).exp()
    rho = torch.randn(shape, generator=g, dtype=torch.float64).exp()
    advantages = torch.randn(shape, generator=g, dtype=torch.float64)
    return ratio, advantages, rho, torch.rand(shape, generator=g) < 0.7


def slow_loss(ratio, advantage, rho, config, truncation=2.0):
    low, high = 1 - config.clip_low, (1 + config.clip_high) * min(max(1.0, rho / truncation), 10.0)
    surrogate = min(ratio * advantage, min(max(ratio, low), high) * advantage)
    if config.dual_clip is not None and advantage < 0:
        surrogate = max(surrogate, config.dual_clip * advantage)
    return -min(rho, truncation) * surrogate


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_loss_and_its_metrics_equal_a_slow_loop(dual_clip):
    ratio, advantages, rho, mask = random_case()
    config = PolicyLossConfig(clip_low=0.2, clip_high=0.28, dual_clip=dual_clip)
    output = ppo_clip(inputs(ratio, advantages, rho, mask=mask), config)
    count = dict.fromkeys(("high", "low", "changed", "dual"), 0)
    for i in [tuple(x) for x in mask.nonzero().tolist()]:
        r, a, p = ratio[i].item(), advantages[i].item(), rho[i].item()
        high = 1.28 * min(max(1.0, p / 2.0), 10.0)
        assert output.loss[i].item() == pytest.approx(slow_loss(r, a, p, config), rel=1e-9)
        count["high"] += a > 0 and r > high
        count["low"] += a < 0 and r < 0.8
        count["changed"] += a > 0 and 1.28 < r <= high
        count["dual"] += a < 0 and dual_clip is not None and r > dual_clip
    n, metrics = mask.sum().item(), reduce_metrics([output.metrics])
    trained = ratio[mask].tolist()
    assert count["changed"] > 0 and count["high"] > 0 and count["low"] > 0
    assert metrics["policy/clip_high_fraction"] == pytest.approx(count["high"] / n)
    assert metrics["policy/clip_low_fraction"] == pytest.approx(count["low"] / n)
    assert metrics["acr/changed_fraction"] == pytest.approx(count["changed"] / n)
    assert metrics.get("policy/dual_clip_fraction", 0.0) == pytest.approx(count["dual"] / n)
    assert metrics["policy/loss"] == pytest.approx(output.loss[mask].sum().item() / n)
    assert metrics["policy/kl_old_current"] == pytest.approx(sum(r - 1 - math.log(r) for r in trained) / n, rel=1e-9)


def test_acr_pushes_a_good_token_of_large_rho_where_tis_does_not():
    case = {"ratio": 1.5, "advantages": 1.0, "rho": 4 * 2.0}
    _, acr = loss_and_gradient(inputs(**case, correction="acr"))
    _, tis = loss_and_gradient(inputs(**case, correction="tis"))
    assert acr.item() == pytest.approx(-2.0 * 1.5)  # -weight * R * A, the derivative of R by log pi being R
    assert tis.item() == 0.0


@pytest.mark.parametrize(
    "ratio, advantage, rho",
    [(1.5, 1.0, 2.0), (1.5, 1.0, 0.3), (0.5, 1.0, 50.0), (1.2, 1.0, 50.0), (1.5, -1.0, 50.0), (0.5, -1.0, 50.0), (1.5, 0.0, 50.0)],
)
def test_acr_is_tis_bit_for_bit_unless_rho_a_and_r_are_all_large(ratio, advantage, rho):
    acr = loss_and_gradient(inputs(ratio, advantage, rho, "acr", dtype=torch.float32))
    tis = loss_and_gradient(inputs(ratio, advantage, rho, "tis", dtype=torch.float32))
    assert torch.equal(acr[0], tis[0]) and torch.equal(acr[1], tis[1])


@given(ratio=st.floats(0.05, 20), advantage=st.floats(-5, 5), rho=st.floats(0.01, 1e5))
def test_acr_differs_from_tis_only_where_it_says_so(ratio, advantage, rho):
    acr = loss_and_gradient(inputs(ratio, advantage, rho, "acr"))
    tis = loss_and_gradient(inputs(ratio, advantage, rho, "tis"))
    if rho <= 1.999 or advantage <= 0 or ratio <= 1.199:
        assert torch.equal(acr[0], tis[0]) and torch.equal(acr[1], tis[1])
    assert acr[0].item() <= tis[0].item() + 1e-12  # a wider bound cannot raise the loss


@pytest.mark.parametrize("clip_high", [0.0, 0.2])
def test_the_first_step_has_the_policy_gradient_whatever_the_bounds(clip_high):
    config = PolicyLossConfig(clip_low=0.0, clip_high=clip_high)
    _, gradient = loss_and_gradient(inputs([1.0, 1.0], [0.7, -0.7], [1.0, 1.0]), config)
    assert gradient.tolist() == [pytest.approx([-0.7, 0.7])]


def test_what_lies_under_the_mask_does_not_matter_even_nan():
    ratio, advantages, rho, mask = random_case()
    clean = inputs(ratio, advantages, rho, mask=mask)
    nan = torch.full_like(ratio, math.nan)
    dirty = PolicyLossInputs(
        logprobs=torch.where(mask, clean.logprobs.detach(), nan).requires_grad_(),
        base_logprobs=torch.where(mask, clean.base_logprobs, nan), advantages=torch.where(mask, advantages, nan), mask=mask,
        weights=torch.where(mask, clean.weights, nan), clip_high_scale=torch.where(mask, clean.clip_high_scale, nan),
    )
    expected, got = loss_and_gradient(clean), loss_and_gradient(dirty)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert (got[0][~mask] == 0).all() and (got[1][~mask] == 0).all()
    assert ppo_clip(dirty, PolicyLossConfig()).metrics == ppo_clip(clean, PolicyLossConfig()).metrics


def test_a_nan_at_a_trained_token_reaches_the_loss():
    x = inputs([math.nan, 1.0], [1.0, 1.0], [1.0, 1.0])
    assert ppo_clip(x, PolicyLossConfig()).loss.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("aggregation", list(Aggregation))
@pytest.mark.parametrize("correction", list(CORRECTIONS))
def test_splitting_a_mini_batch_changes_neither_loss_nor_gradient_nor_metrics(aggregation, correction):
    ratio, advantages, rho, mask = random_case((6, 5))
    weights = torch.tensor(token_weights(mask.sum(1).tolist(), aggregation), dtype=torch.float64)

    def run(rows):
        x = inputs(ratio[rows], advantages[rows], rho[rows], correction, mask=mask[rows])
        output = ppo_clip(x, PolicyLossConfig())
        loss = (output.loss.sum(1) * weights[rows]).sum()
        return loss.item(), torch.autograd.grad(loss, x.logprobs)[0], output.metrics

    whole_loss, whole_gradient, whole_metrics = run(slice(0, 6))
    parts = [run(rows) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert sum(p[0] for p in parts) == pytest.approx(whole_loss, rel=1e-12)
    assert torch.allclose(torch.cat([p[1] for p in parts]), whole_gradient, rtol=1e-12, atol=0)
    assert reduce_metrics([p[2] for p in parts]) == pytest.approx(reduce_metrics([whole_metrics]), rel=1e-12)


def test_bfloat16_logprobs_are_computed_on_in_float32():
    x = inputs([1.1], [1.0], [1.0], dtype=torch.bfloat16)
    assert ppo_clip(x, PolicyLossConfig()).loss.dtype == torch.float32


@pytest.mark.parametrize(
    "key, value", [("clip_low", -0.1), ("clip_low", 1.5), ("clip_high", -0.1), ("clip_high", math.nan), ("dual_clip", 1.0)]
)
def test_bounds_that_make_no_sense_are_refused_by_key(key, value):
    with pytest.raises(ValueError, match=f"algorithm.policy_loss.{key}="):
        ppo_clip(inputs([1.0], [1.0], [1.0]), PolicyLossConfig(**{key: value}))
