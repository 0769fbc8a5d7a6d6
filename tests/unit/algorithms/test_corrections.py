import math

import pytest
import torch

from qurl.algorithms import CORRECTIONS, mismatch_metrics
from qurl.config import CorrectionConfig
from qurl.observability.metrics import reduce_metrics


def logprob_pair(shape=(3, 7), spread=1.5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rollout = -3 * torch.rand(shape, generator=generator, dtype=dtype)
    old = rollout + spread * torch.randn(shape, generator=generator, dtype=dtype)
    mask = torch.rand(shape, generator=generator) < 0.7
    return old, rollout, mask


def slow_metrics(old, rollout, mask, truncation):
    kl, ratios, gaps, weights = [], [], [], []
    for o, r, m in zip(old.flatten().tolist(), rollout.flatten().tolist(), mask.flatten().tolist(), strict=True):
        if m:
            rho = math.exp(o - r)
            kl.append(rho - 1 - (o - r))
            ratios.append(rho)
            gaps.append(abs(o - r))
            weights.append(min(rho, truncation))
    n = len(ratios)
    return {
        "mismatch/kl_rollout_old": sum(kl) / n,
        "mismatch/ratio_max": max(ratios),
        "mismatch/ratio_mean": sum(ratios) / n,
        "mismatch/abs_logprob_diff": sum(gaps) / n,
        "mismatch/truncated_fraction": sum(x > truncation for x in ratios) / n,
        "mismatch/ess_fraction": sum(weights) ** 2 / (n * sum(w * w for w in weights)),
    }


def test_mismatch_metrics_equal_a_slow_loop():
    old, rollout, mask = logprob_pair()
    metrics = reduce_metrics([mismatch_metrics(old, rollout, mask, 2.0)])
    assert metrics == pytest.approx(slow_metrics(old, rollout, mask, 2.0), rel=1e-12)


def test_mismatch_metrics_do_not_depend_on_how_the_batch_is_split():
    old, rollout, mask = logprob_pair((5, 6))
    mask[3] = False  # a share without trained tokens
    whole = reduce_metrics([mismatch_metrics(old, rollout, mask, 2.0)])
    shares = [slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 5)]
    split = reduce_metrics([mismatch_metrics(old[s], rollout[s], mask[s], 2.0) for s in shares])
    assert split == pytest.approx(whole, rel=1e-12)


def test_equal_policies_have_no_mismatch():
    old, _, mask = logprob_pair()
    metrics = reduce_metrics([mismatch_metrics(old, old, mask, 2.0)])
    assert metrics == {
        "mismatch/kl_rollout_old": 0.0, "mismatch/ratio_max": 1.0, "mismatch/ratio_mean": 1.0, "mismatch/abs_logprob_diff": 0.0,
        "mismatch/truncated_fraction": 0.0, "mismatch/ess_fraction": 1.0,
    }


def test_a_batch_without_trained_tokens_reports_zeros():
    old, rollout, mask = logprob_pair()
    metrics = reduce_metrics([mismatch_metrics(old, rollout, torch.zeros_like(mask), 2.0)])
    assert set(metrics.values()) == {0.0}


def test_weights_and_bounds_follow_the_equations_token_by_token():
    old, rollout, mask = logprob_pair()
    config = CorrectionConfig(truncation=2.0, max_clip_scale=3.0)
    result = {name: CORRECTIONS[name](old, rollout, mask, config) for name in CORRECTIONS}
    for index in mask.nonzero().tolist():
        i = tuple(index)
        rho = math.exp(old[i].item() - rollout[i].item())
        expected = {
            "naive": (rollout[i].item(), 1.0, 1.0),
            "none": (old[i].item(), 1.0, 1.0),
            "decoupled": (old[i].item(), rho, 1.0),
            "tis": (old[i].item(), min(rho, 2.0), 1.0),
            "acr": (old[i].item(), min(rho, 2.0), min(max(1.0, rho / 2.0), 3.0)),
        }
        for name, values in expected.items():
            c = result[name]
            assert (c.base_logprobs[i].item(), c.weights[i].item(), c.clip_high_scale[i].item()) == pytest.approx(values, rel=1e-12)
            assert c.keep_mask[i]


def test_acr_is_tis_bit_for_bit_where_rho_stays_below_the_truncation():
    old, rollout, mask = logprob_pair(spread=0.2, dtype=torch.float32)
    config = CorrectionConfig(truncation=float((old - rollout).exp().max()))
    acr, tis = CORRECTIONS["acr"](old, rollout, mask, config), CORRECTIONS["tis"](old, rollout, mask, config)
    assert torch.equal(acr.weights, tis.weights)
    assert torch.equal(acr.clip_high_scale, torch.ones_like(old))
    assert acr.metrics["acr/widened_fraction"].value == 0.0


def test_acr_counts_the_tokens_it_widens():
    rollout = torch.zeros(1, 4)
    old = torch.tensor([[0.0, 1.0, 1.0, 5.0]])
    mask = torch.tensor([[True, True, True, False]])
    metrics = CORRECTIONS["acr"](old, rollout, mask, CorrectionConfig(truncation=2.0)).metrics
    assert metrics["acr/widened_fraction"].value == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", list(CORRECTIONS))
def test_extreme_logprobs_stay_finite(name):
    old = torch.tensor([[-1e4, 0.0, -300.0]])
    rollout = torch.tensor([[0.0, -1e4, -math.inf]])
    correction = CORRECTIONS[name](old, rollout, torch.ones(1, 3, dtype=torch.bool), CorrectionConfig())
    assert correction.weights.isfinite().all() and correction.clip_high_scale.isfinite().all()
    assert all(math.isfinite(v) for v in reduce_metrics([correction.metrics]).values())


def test_no_gradient_flows_through_a_correction():
    old, rollout, mask = (t.requires_grad_() if t.is_floating_point() else t for t in logprob_pair())
    for correction in CORRECTIONS.values():
        result = correction(old, rollout, mask, CorrectionConfig())
        assert not (result.base_logprobs.requires_grad or result.weights.requires_grad or result.clip_high_scale.requires_grad)


@pytest.mark.parametrize(
    "key, value", [("truncation", 0.0), ("truncation", math.nan), ("max_clip_scale", 0.5), ("max_clip_scale", math.nan)]
)
def test_bounds_that_make_no_sense_are_refused_by_key(key, value):
    with pytest.raises(ValueError, match=f"algorithm.correction.{key}="):
        CORRECTIONS["acr"](*logprob_pair(), CorrectionConfig(**{key: value}))
