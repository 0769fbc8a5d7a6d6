import math

import pytest
import torch
from packed_rows import one_sequence_per_row, packed, trained_positions

from qurl.algorithms import CORRECTIONS, CorrectionInputs, mismatch_metrics
from qurl.config import CorrectionConfig, Rejection
from qurl.config.algorithm import REJECTION_BOUNDS
from qurl.observability.metrics import reduce_metrics


def correct(name, old, rollout, mask, segment_ids=None, **config):
    """A correction of one sequence per row, unless segment_ids say otherwise."""
    if segment_ids is None:
        segment_ids = torch.arange(len(old))[:, None].expand(old.shape)
    inputs = CorrectionInputs(old_logprobs=old, rollout_logprobs=rollout, mask=mask, segment_ids=segment_ids)
    return CORRECTIONS[name](inputs, CorrectionConfig(**config))


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


def slow_correction(name, old, rollout, all_old, all_rollout):
    """(base, weight, clip_high_scale, kept) of a token, from its sequence's logprobs; C = 2, cap 3, IcePop's own band."""
    rho = math.exp(old - rollout)
    product = math.prod(math.exp(o - r) for o, r in zip(all_old, all_rollout, strict=True))
    return {
        "naive": (rollout, 1.0, 1.0, True),
        "none": (old, 1.0, 1.0, True),
        "decoupled": (old, rho, 1.0, True),
        "tis": (old, min(rho, 2.0), 1.0, True),
        "acr": (old, min(rho, 2.0), min(max(1.0, rho / 2.0), 3.0), True),
        "sequence_tis": (old, min(product, 2.0), 1.0, True),
        "icepop": (old, rho, 1.0, 0.5 <= rho <= 5.0),
    }[name]


@pytest.mark.parametrize("name", list(CORRECTIONS))
def test_weights_and_bounds_follow_the_equations_token_by_token(name):
    segment_ids, mask = packed()
    old, rollout, _ = logprob_pair((3, 8))
    c = correct(name, old, rollout, mask, segment_ids, truncation=2.0, max_clip_scale=3.0)
    for positions in trained_positions():
        sequence = [old[p].item() for p in positions], [rollout[p].item() for p in positions]
        for p in positions:
            base, weight, scale, kept = slow_correction(name, old[p].item(), rollout[p].item(), *sequence)
            found = c.base_logprobs[p].item(), c.weights[p].item(), c.clip_high_scale[p].item()
            assert found == pytest.approx((base, weight, scale), rel=1e-12)
            assert bool(c.keep_mask[p]) is kept
    assert not (c.keep_mask & ~mask).any()
    if name == "icepop":
        assert 0 < c.metrics["mismatch/rejected_fraction"].value < 1


MEASURES = {
    Rejection.token: lambda rhos, i: rhos[i],
    Rejection.sequence: lambda rhos, i: math.prod(rhos),
    Rejection.geometric: lambda rhos, i: math.prod(rhos) ** (1 / len(rhos)),
    Rejection.k3: lambda rhos, i: sum(r - 1 - math.log(r) for r in rhos) / len(rhos),
}


@pytest.mark.parametrize("bounds", [(None, None), (0.3, 1.2), (0.0, 0.6)])
@pytest.mark.parametrize("rejection", MEASURES)
def test_rejection_keeps_the_tokens_whose_measure_is_within_bounds(rejection, bounds):
    segment_ids, mask = packed()
    old, rollout, _ = logprob_pair((3, 8), spread=0.6)
    config = {"rejection": rejection, "rejection_low": bounds[0], "rejection_high": bounds[1]}
    low, high = REJECTION_BOUNDS[rejection] if bounds == (None, None) else bounds
    kept = 0
    for name in ("acr", "tis", "none"):
        c = correct(name, old, rollout, mask, segment_ids, **config)
        for positions in trained_positions():
            rhos = [math.exp(old[p].item() - rollout[p].item()) for p in positions]
            for i, p in enumerate(positions):
                assert bool(c.keep_mask[p]) is (low <= MEASURES[rejection](rhos, i) <= high)
                kept += bool(c.keep_mask[p])
        plain = correct(name, old, rollout, mask, segment_ids)
        assert torch.equal(c.weights, plain.weights) and torch.equal(c.clip_high_scale, plain.clip_high_scale)
        rejected = 1 - c.keep_mask.sum().item() / mask.sum().item()
        assert c.metrics["mismatch/rejected_fraction"].value == pytest.approx(rejected)
    assert kept < 3 * mask.sum()


def test_a_token_whose_rho_is_not_a_number_is_not_rejected_so_that_the_loss_hears_of_it():
    old, rollout = torch.tensor([[math.nan, 0.0]]), torch.zeros(1, 2)
    for rejection in MEASURES:
        assert correct("tis", old, rollout, torch.ones(1, 2, dtype=torch.bool), rejection=rejection).keep_mask[0, 0]


@pytest.mark.parametrize("name", list(CORRECTIONS))
def test_a_correction_does_not_depend_on_the_packing(name):
    segment_ids, mask = packed()
    alone_ids, alone_mask, index = one_sequence_per_row()
    old, rollout, _ = logprob_pair((3, 8))
    rejection = Rejection.none if name == "icepop" else Rejection.geometric
    config = {"rejection": rejection, "rejection_low": None if name == "icepop" else 0.5}
    together = correct(name, old, rollout, mask, segment_ids, **config)
    alone = correct(name, old.flatten()[index], rollout.flatten()[index], alone_mask, alone_ids, **config)
    for field in ("base_logprobs", "weights", "clip_high_scale", "keep_mask"):
        moved = getattr(together, field).flatten()[index]
        assert torch.equal(getattr(alone, field)[alone_mask], moved[alone_mask])


def test_acr_is_tis_bit_for_bit_where_rho_stays_below_the_truncation():
    old, rollout, mask = logprob_pair(spread=0.2, dtype=torch.float32)
    truncation = float((old - rollout).exp().max())
    acr, tis = (correct(name, old, rollout, mask, truncation=truncation) for name in ("acr", "tis"))
    assert torch.equal(acr.weights, tis.weights)
    assert torch.equal(acr.clip_high_scale, torch.ones_like(old))
    assert acr.metrics["acr/widened_fraction"].value == 0.0


def test_acr_counts_the_tokens_it_widens():
    rollout = torch.zeros(1, 4)
    old = torch.tensor([[0.0, 1.0, 1.0, 5.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert correct("acr", old, rollout, mask, truncation=2.0).metrics["acr/widened_fraction"].value == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", list(CORRECTIONS))
def test_extreme_logprobs_stay_finite(name):
    old = torch.tensor([[-1e4, 0.0, -300.0]])
    rollout = torch.tensor([[0.0, -1e4, -math.inf]])
    correction = correct(name, old, rollout, torch.ones(1, 3, dtype=torch.bool))
    assert correction.weights.isfinite().all() and correction.clip_high_scale.isfinite().all()
    assert all(math.isfinite(v) for v in reduce_metrics([correction.metrics]).values())


@pytest.mark.parametrize("name", list(CORRECTIONS))
def test_no_gradient_flows_through_a_correction(name):
    old, rollout, mask = (t.requires_grad_() if t.is_floating_point() else t for t in logprob_pair())
    result = correct(name, old, rollout, mask)
    assert not (result.base_logprobs.requires_grad or result.weights.requires_grad or result.clip_high_scale.requires_grad)


@pytest.mark.parametrize(
    "key, value", [("truncation", 0.0), ("truncation", math.nan), ("max_clip_scale", 0.5), ("max_clip_scale", math.nan)]
)
def test_bounds_that_make_no_sense_are_refused_by_key(key, value):
    with pytest.raises(ValueError, match=f"algorithm.correction.{key}="):
        correct("acr", *logprob_pair(), **{key: value})


def test_a_rejection_that_keeps_nothing_or_that_icepop_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"rejection_low=0\.5 and rejection_high=0\.1"):
        correct("tis", *logprob_pair(), rejection=Rejection.token, rejection_high=0.1)
    with pytest.raises(ValueError, match="rejection=geometric with name=icepop"):
        correct("icepop", *logprob_pair(), rejection=Rejection.geometric)
