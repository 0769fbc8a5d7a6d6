import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_rows import one_sequence_per_row, packed, trained_positions

from qurl.algorithms import CORRECTIONS, POLICY_LOSSES, CorrectionInputs, PolicyLossInputs, ppo_clip, token_weights
from qurl.config import Aggregation, CorrectionConfig, PolicyLossConfig
from qurl.observability.metrics import reduce_metrics


def inputs(ratio, advantages, rho, correction="acr", mask=None, truncation=2.0, dtype=torch.float64, segment_ids=None):
    """A batch with the given R = pi / pi_old and rho = pi_old / pi_rollout; one sequence per row without segment_ids."""
    ratio, advantages, rho = (torch.atleast_2d(torch.as_tensor(x, dtype=dtype)) for x in (ratio, advantages, rho))
    mask = torch.ones_like(ratio, dtype=torch.bool) if mask is None else mask
    segment_ids = torch.arange(len(ratio))[:, None].expand(ratio.shape) if segment_ids is None else segment_ids
    old = torch.full_like(ratio, -1.0)
    mismatch = CorrectionInputs(old_logprobs=old, rollout_logprobs=old - rho.log(), mask=mask, segment_ids=segment_ids)
    c = CORRECTIONS[correction](mismatch, CorrectionConfig(truncation=truncation, max_clip_scale=10.0))
    logprobs = (old + ratio.log()).detach().requires_grad_()
    return PolicyLossInputs(logprobs=logprobs, base_logprobs=c.base_logprobs, advantages=advantages, mask=c.keep_mask,
                            weights=c.weights, clip_high_scale=c.clip_high_scale, segment_ids=segment_ids)


def loss_and_gradient(x, config=None, name="ppo_clip"):
    loss = POLICY_LOSSES[name](x, config or PolicyLossConfig()).loss
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
    count = dict.fromkeys(("high", "low", "changed", "dual", "changed_gradient", "gradient"), 0)
    for i in [tuple(x) for x in mask.nonzero().tolist()]:
        r, a, p = ratio[i].item(), advantages[i].item(), rho[i].item()
        high = 1.28 * min(max(1.0, p / 2.0), 10.0)
        assert output.loss[i].item() == pytest.approx(slow_loss(r, a, p, config), rel=1e-9)
        count["high"] += a > 0 and r > high
        count["low"] += a < 0 and r < 0.8
        count["changed"] += a > 0 and 1.28 < r <= high
        count["dual"] += a < 0 and dual_clip is not None and r > dual_clip
        has_gradient = r <= high if a > 0 else r >= 0.8 and (dual_clip is None or r <= dual_clip)
        count["gradient"] += has_gradient * min(p, 2.0) * abs(a) * r
        count["changed_gradient"] += (a > 0 and 1.28 < r <= high) * min(p, 2.0) * a * r
    n, metrics = mask.sum().item(), reduce_metrics([output.metrics])
    trained = ratio[mask].tolist()
    assert count["changed"] > 0 and count["high"] > 0 and count["low"] > 0
    assert metrics["policy/clip_high_fraction"] == pytest.approx(count["high"] / n)
    assert metrics["policy/clip_low_fraction"] == pytest.approx(count["low"] / n)
    assert metrics["acr/changed_fraction"] == pytest.approx(count["changed"] / n)
    assert metrics["acr/changed_gradient_fraction"] == pytest.approx(count["changed_gradient"] / count["gradient"])
    assert metrics.get("policy/dual_clip_fraction", 0.0) == pytest.approx(count["dual"] / n)
    assert metrics["policy/loss"] == pytest.approx(output.loss[mask].sum().item() / n)
    assert metrics["policy/kl_old_current"] == pytest.approx(sum(r - 1 - math.log(r) for r in trained) / n, rel=1e-9)


def test_the_gradient_that_the_metrics_speak_of_is_that_of_the_loss():
    ratio, advantages, rho, mask = random_case()
    config = PolicyLossConfig(clip_low=0.2, clip_high=0.28, dual_clip=1.5)
    wide, narrow = (inputs(ratio, advantages, rho, name, mask=mask) for name in ("acr", "tis"))
    (_, of_acr), (_, of_tis) = loss_and_gradient(wide, config), loss_and_gradient(narrow, config)
    changed = (of_acr != of_tis) & mask
    metrics = reduce_metrics([ppo_clip(wide, config).metrics])
    assert metrics["acr/changed_fraction"] == pytest.approx(changed.sum().item() / mask.sum().item())
    expected = (of_acr[changed].abs().sum() / of_acr.abs().sum()).item()
    assert metrics["acr/changed_gradient_fraction"] == pytest.approx(expected, rel=1e-9)
    assert reduce_metrics([ppo_clip(narrow, config).metrics])["acr/changed_gradient_fraction"] == 0.0


def slow_gspo(ratios, advantages, weights, scales, config):
    """(losses, gradients by log pi) of one response, token by token; the response's ratio decides on clipping."""
    of_response = math.prod(ratios) ** (1 / len(ratios))
    losses, gradients = [], []
    for a, w, scale in zip(advantages, weights, scales, strict=True):
        low, high = 1 - config.clip_low, (1 + config.clip_high) * scale
        clipped = (a > 0 and of_response > high) or (a < 0 and of_response < low)
        losses.append(-w * a * (min(max(of_response, low), high) if clipped else of_response))
        gradients.append(0.0 if clipped else -w * a * of_response)
    return losses, gradients


@pytest.mark.parametrize("correction", ["tis", "acr", "sequence_tis", "icepop"])
def test_gspo_clips_responses_as_a_slow_loop_does(correction):
    segment_ids, mask = packed()
    ratio, advantages, rho, _ = random_case((3, 8))
    x = inputs(ratio, advantages, rho, correction, mask=mask, segment_ids=segment_ids)
    config = PolicyLossConfig(clip_low=0.1, clip_high=0.15)
    loss, gradient = loss_and_gradient(x, config, "gspo")
    for positions in trained_positions():
        kept = [p for p in positions if x.mask[p]]
        if kept:
            columns = ([t[p].item() for p in kept] for t in (ratio, advantages, x.weights, x.clip_high_scale))
            losses, gradients = slow_gspo(*columns, config)
            assert [loss[p].item() for p in kept] == pytest.approx(losses, rel=1e-9)
            assert [gradient[p].item() for p in kept] == pytest.approx(gradients, rel=1e-9)
    assert (loss[~x.mask] == 0).all() and (gradient[~x.mask] == 0).all()


def test_gspo_has_the_gradient_of_the_response_level_objective():
    ratio, _, _, mask = random_case((4, 6))
    mask[:, 0] = True
    worth = torch.tensor([0.7, -0.4, 0.2, -1.1], dtype=torch.float64)
    x = inputs(ratio, worth[:, None].expand(4, 6), torch.ones(4, 6), "none", mask=mask)
    config = PolicyLossConfig(clip_low=0.3, clip_high=0.3, aggregation=Aggregation.sequence_mean)
    weights = torch.tensor(token_weights(mask.sum(1).tolist(), config), dtype=torch.float64)
    total = (POLICY_LOSSES["gspo"](x, config).loss.sum(1) * weights).sum()
    (found,) = torch.autograd.grad(total, x.logprobs)
    logprobs = x.logprobs.detach().clone().requires_grad_()
    of_response = torch.stack([(logprobs[i] - x.base_logprobs[i])[mask[i]].mean().exp() for i in range(4)])
    expected_loss = -torch.minimum(of_response * worth, of_response.clamp(0.7, 1.3) * worth).mean()
    assert total.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    assert torch.allclose(found, torch.autograd.grad(expected_loss, logprobs)[0], rtol=1e-9, atol=1e-15)


def test_cispo_bounds_ratios_and_keeps_every_gradient_as_a_slow_loop_does():
    ratio, advantages, rho, mask = random_case()
    x = inputs(ratio, advantages, rho, mask=mask)
    config = PolicyLossConfig(name="cispo", clip_low=0.4, clip_high=0.28)
    loss, gradient = loss_and_gradient(x, config, "cispo")
    changed = high_count = low_count = 0
    for i in [tuple(p) for p in mask.nonzero().tolist()]:
        r, a, p = ratio[i].item(), advantages[i].item(), rho[i].item()
        high = 1.28 * (min(max(1.0, p / 2.0), 10.0) if a > 0 else 1.0)
        weight = min(p, 2.0) * min(max(r, 0.6), high)
        assert gradient[i].item() == pytest.approx(-weight * a, rel=1e-9) and gradient[i] != 0
        assert loss[i].item() == pytest.approx(-weight * a * (-1.0 + math.log(r)), rel=1e-9)
        changed, high_count, low_count = changed + (a > 0 and r > 1.28 and p > 2), high_count + (r > high), low_count + (r < 0.6)
    metrics = reduce_metrics([POLICY_LOSSES["cispo"](x, config).metrics])
    of_acr, of_tis = (loss_and_gradient(inputs(ratio, advantages, rho, c, mask=mask), config, "cispo")[1] for c in ("acr", "tis"))
    assert changed == int((of_acr != of_tis).sum())
    assert metrics["acr/changed_fraction"] == pytest.approx(changed / mask.sum().item())
    assert metrics["policy/clip_high_fraction"] == pytest.approx(high_count / mask.sum().item())
    assert metrics["policy/clip_low_fraction"] == pytest.approx(low_count / mask.sum().item())
    share = of_acr[of_acr != of_tis].abs().sum() / of_acr.abs().sum()
    assert metrics["acr/changed_gradient_fraction"] == pytest.approx(share.item(), rel=1e-9)


def test_cispo_refuses_dual_clip():
    with pytest.raises(ValueError, match=r"algorithm\.policy_loss\.dual_clip=3.0 does nothing"):
        POLICY_LOSSES["cispo"](inputs([1.0], [1.0], [1.0]), PolicyLossConfig(name="cispo", dual_clip=3.0))


@pytest.mark.parametrize("name", list(POLICY_LOSSES))
def test_a_loss_does_not_depend_on_the_packing(name):
    segment_ids, mask = packed()
    alone_ids, alone_mask, index = one_sequence_per_row()
    case = random_case((3, 8))[:3]
    together = loss_and_gradient(inputs(*case, "sequence_tis", mask=mask, segment_ids=segment_ids), name=name)
    moved = (t.flatten()[index] for t in case)
    alone = loss_and_gradient(inputs(*moved, "sequence_tis", mask=alone_mask, segment_ids=alone_ids), name=name)
    for found, expected in zip(alone, together, strict=True):
        assert torch.allclose(found[alone_mask], expected.flatten()[index][alone_mask], rtol=1e-12, atol=0)


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


@pytest.mark.parametrize("name", list(POLICY_LOSSES))
@pytest.mark.parametrize("clip_high", [0.0, 0.2])
def test_the_first_step_has_the_policy_gradient_whatever_the_bounds(clip_high, name):
    config = PolicyLossConfig(clip_low=0.0, clip_high=clip_high)
    _, gradient = loss_and_gradient(inputs([1.0, 1.0], [0.7, -0.7], [1.0, 1.0]), config, name)
    assert gradient.tolist() == [pytest.approx([-0.7, 0.7])]


@pytest.mark.parametrize("name", list(POLICY_LOSSES))
def test_what_lies_under_the_mask_does_not_matter_even_nan(name):
    ratio, advantages, rho, mask = random_case()
    clean = inputs(ratio, advantages, rho, mask=mask)
    nan = torch.full_like(ratio, math.nan)
    dirty = PolicyLossInputs(
        logprobs=torch.where(mask, clean.logprobs.detach(), nan).requires_grad_(),
        base_logprobs=torch.where(mask, clean.base_logprobs, nan), advantages=torch.where(mask, advantages, nan), mask=mask,
        weights=torch.where(mask, clean.weights, nan), clip_high_scale=torch.where(mask, clean.clip_high_scale, nan),
        segment_ids=clean.segment_ids,
    )
    expected, got = loss_and_gradient(clean, name=name), loss_and_gradient(dirty, name=name)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert (got[0][~mask] == 0).all() and (got[1][~mask] == 0).all()
    metrics = [POLICY_LOSSES[name](x, PolicyLossConfig()).metrics for x in (dirty, clean)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("name", list(POLICY_LOSSES))
def test_a_nan_at_a_trained_token_reaches_the_loss(name):
    x = inputs([[math.nan], [1.0]], [[1.0], [1.0]], [[1.0], [1.0]])
    assert POLICY_LOSSES[name](x, PolicyLossConfig()).loss.isnan().tolist() == [[True], [False]]


@pytest.mark.parametrize("aggregation", list(Aggregation))
@pytest.mark.parametrize("correction", list(CORRECTIONS))
@pytest.mark.parametrize("name", list(POLICY_LOSSES))
def test_splitting_a_mini_batch_changes_neither_loss_nor_gradient_nor_metrics(name, aggregation, correction):
    ratio, advantages, rho, mask = random_case((6, 5))
    config = PolicyLossConfig(aggregation=aggregation, aggregation_constant=7)
    weights = torch.tensor(token_weights(mask.sum(1).tolist(), config), dtype=torch.float64)

    def run(rows):
        x = inputs(ratio[rows], advantages[rows], rho[rows], correction, mask=mask[rows])
        output = POLICY_LOSSES[name](x, config)
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
