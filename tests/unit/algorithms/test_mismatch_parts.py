"""The parts of the mismatch against a slow loop, and what holds between them."""

import math

import pytest
import torch

from qurl.algorithms import mismatch_metrics, mismatch_parts
from qurl.observability.metrics import reduce_metrics

SHAPE = (4, 9)


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(SHAPE, generator=generator, dtype=torch.float64)
    quantized, rollout = (old + 0.3 * torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(SHAPE, generator=generator) < 0.7
    is_stale = torch.tensor([True, False, False, True])[:, None].expand(SHAPE)
    return old, quantized, rollout, mask, is_stale


def slow_parts(old, quantized, rollout, mask, is_stale):
    terms = {"quantization": [], "engine": [], "staleness": []}
    for row in range(SHAPE[0]):
        for column in range(SHAPE[1]):
            if mask[row, column]:
                o, q, r = (x[row, column].item() for x in (old, quantized, rollout))
                terms["quantization"].append(q - o)
                terms["staleness" if is_stale[row, column] else "engine"].append(r - q)
    found = {"mismatch/quantization_ratio_max": math.exp(-min(terms["quantization"]))}
    for name, differences in terms.items():
        found[f"mismatch/{name}_log_ratio"] = sum(differences) / len(differences)
        found[f"mismatch/{name}_kl"] = sum(math.exp(-d) - 1 + d for d in differences) / len(differences)
    return found


def test_every_part_equals_a_slow_loop_however_rows_are_split():
    inputs = draw()
    expected = slow_parts(*inputs)
    assert reduce_metrics([mismatch_parts(*inputs)]) == pytest.approx(expected, rel=1e-12)
    rows = [mismatch_parts(*(x[row : row + 1] for x in inputs)) for row in range(SHAPE[0])]
    assert reduce_metrics(rows) == pytest.approx(expected, rel=1e-12)


def test_log_ratios_add_up_to_the_whole_gap():
    old, quantized, rollout, mask, is_stale = draw(seed=1)
    parts = reduce_metrics([mismatch_parts(old, quantized, rollout, mask, is_stale)])
    stale = (mask & is_stale).sum().item() / mask.sum().item()
    total = (rollout - old)[mask].mean().item()
    joined = parts["mismatch/quantization_log_ratio"] + (1 - stale) * parts["mismatch/engine_log_ratio"]
    assert joined + stale * parts["mismatch/staleness_log_ratio"] == pytest.approx(total, rel=1e-12)


def test_where_the_engine_is_the_learner_all_is_quantization_and_without_it_all_is_the_engine():
    old, quantized, rollout, mask, is_stale = draw(seed=2)
    fresh = torch.zeros_like(is_stale)
    exact = reduce_metrics([mismatch_parts(old, rollout, rollout, mask, fresh)])
    whole = reduce_metrics([mismatch_metrics(old, rollout, mask, truncation=2.0)])
    assert exact["mismatch/engine_kl"] == 0 and exact["mismatch/quantization_kl"] == whole["mismatch/kl_rollout_old"]
    assert exact["mismatch/quantization_ratio_max"] == whole["mismatch/ratio_max"]
    unquantized = reduce_metrics([mismatch_parts(old, old, rollout, mask, fresh)])
    assert unquantized["mismatch/quantization_kl"] == 0 and unquantized["mismatch/quantization_ratio_max"] == 1
    assert unquantized["mismatch/engine_kl"] == whole["mismatch/kl_rollout_old"]
    assert "mismatch/staleness_kl" not in unquantized


def test_of_engines_in_full_precision_quantization_is_what_it_would_be():
    old, quantized, rollout, mask, is_stale = draw(seed=4)
    found = mismatch_parts(old, quantized, rollout, mask, is_stale, is_quantized=False)
    would_be = mismatch_parts(old, quantized, rollout, mask, is_stale)
    unquantized = mismatch_parts(old, old, rollout, mask, is_stale)
    assert {key for key in found if found[key] != would_be[key]} == {key for key in found if "quantization" not in key}
    assert {key for key in found if found[key] != unquantized[key]} == {key for key in found if "quantization" in key}


def test_masked_tokens_do_not_matter_and_no_tokens_are_no_part():
    old, quantized, rollout, mask, is_stale = draw(seed=3)
    spoiled = [x.masked_fill(~mask, math.nan) for x in (old, quantized, rollout)]
    assert mismatch_parts(*spoiled, mask, is_stale) == mismatch_parts(old, quantized, rollout, mask, is_stale)
    assert set(mismatch_parts(old, quantized, rollout, torch.zeros_like(mask), is_stale)) == {"mismatch/quantization_ratio_max"}


def test_the_floor_is_the_k3_distance_of_two_quantized_forwards_over_fresh_tokens():
    draw = torch.Generator().manual_seed(5)
    old, quantized, rollout, perturbed = (-torch.rand(2, 6, generator=draw).double() for _ in range(4))
    mask, is_stale = torch.ones(2, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 0], is_stale[1] = False, True
    for is_quantized, held in ((True, quantized), (False, old)):
        found = mismatch_parts(old, quantized, rollout, mask, is_stale, is_quantized, perturbed_logprobs=perturbed)
        ratios = [(held - perturbed)[0, t].item() for t in range(1, 6)]
        expected = sum(math.exp(r) - 1 - r for r in ratios) / 5
        assert found["mismatch/engine_kl_floor"].value == pytest.approx(expected, rel=1e-5)
    assert "mismatch/engine_kl_floor" not in mismatch_parts(old, quantized, rollout, mask, is_stale)
    all_stale = torch.ones_like(mask)
    assert "mismatch/engine_kl_floor" not in mismatch_parts(old, quantized, rollout, mask, all_stale, perturbed_logprobs=perturbed)
