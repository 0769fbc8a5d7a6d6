import math

import pytest
import torch
from packed_rows import one_sequence_per_row, packed, trained_positions

from qurl.algorithms import gae, last_trained, sequence_means, sequence_sums


def random_values(seed=0):
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sums_and_means_equal_a_slow_loop_at_every_position_of_a_sequence():
    segment_ids, mask = packed()
    values = random_values().masked_fill(~mask, math.nan)
    sums, means = sequence_sums(values, mask, segment_ids), sequence_means(values, mask, segment_ids)
    for positions in trained_positions():
        expected = sum(values[p].item() for p in positions)
        everywhere = segment_ids == segment_ids[positions[0]]
        assert sums[everywhere].tolist() == pytest.approx([expected] * int(everywhere.sum()), rel=1e-12)
        assert means[everywhere].tolist() == pytest.approx([expected / len(positions)] * int(everywhere.sum()), rel=1e-12)
    untrained = (segment_ids == 3) | (segment_ids < 0)
    assert not sums[untrained].any() and not means[untrained].any()


def test_a_batch_of_padding_has_no_sums_and_no_last_token():
    segment_ids, nothing = torch.full((1, 2), -1), torch.zeros(1, 2, dtype=torch.bool)
    assert not sequence_means(torch.ones(1, 2), nothing, segment_ids).any()
    assert not last_trained(nothing, segment_ids).any()


def test_the_last_trained_token_of_a_sequence_is_one():
    segment_ids, mask = packed()
    assert last_trained(mask, segment_ids).nonzero().tolist() == sorted(list(positions[-1]) for positions in trained_positions())


def slow_gae(rewards, values, discount, lam):
    """Equation 16 as the sum it is: A_t = sum_l (discount lam)^l delta_(t+l)."""
    values = [*values, 0.0]
    deltas = [r + discount * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((discount * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize("discount, lam", [(1.0, 1.0), (0.9, 0.95), (1.0, 0.0), (0.0, 0.5)])
def test_gae_equals_a_slow_sum_over_each_sequence_of_a_packed_row(discount, lam):
    segment_ids, mask = packed()
    rewards, values = (random_values(seed).masked_fill(~mask, math.nan) for seed in (0, 1))
    advantages, returns = gae(rewards, values, mask, segment_ids, discount=discount, gae_lambda=lam)
    assert not advantages[~mask].any() and not returns[~mask].any()
    for positions in trained_positions():
        expected = slow_gae([rewards[p].item() for p in positions], [values[p].item() for p in positions], discount, lam)
        assert [advantages[p].item() for p in positions] == pytest.approx(expected, rel=1e-12)
        assert [returns[p].item() for p in positions] == pytest.approx(
            [a + values[p].item() for a, p in zip(expected, positions, strict=True)], rel=1e-12
        )


def test_gae_does_not_depend_on_the_packing():
    segment_ids, mask = packed()
    alone_ids, alone_mask, index = one_sequence_per_row()
    rewards, values = random_values(0), random_values(1)
    together, _ = gae(rewards, values, mask, segment_ids, discount=0.9, gae_lambda=0.8)
    alone, _ = gae(rewards.flatten()[index], values.flatten()[index], alone_mask, alone_ids, discount=0.9, gae_lambda=0.8)
    assert torch.equal(alone[alone_mask], together.flatten()[index][alone_mask])


def test_gae_without_discount_and_with_lambda_one_is_the_return_less_the_value():
    segment_ids, mask = packed()
    rewards, values = random_values(0), random_values(1)
    _, returns = gae(rewards, values, mask, segment_ids, discount=1.0, gae_lambda=1.0)
    for positions in trained_positions():
        assert returns[positions[0]].item() == pytest.approx(sum(rewards[p].item() for p in positions))


@pytest.mark.parametrize("name", ["discount", "gae_lambda"])
def test_gae_refuses_factors_that_make_no_sense(name):
    segment_ids, mask = packed()
    with pytest.raises(ValueError, match=f"{name}=1.5"):
        gae(random_values(), random_values(), mask, segment_ids, **({"discount": 1.0, "gae_lambda": 1.0} | {name: 1.5}))
