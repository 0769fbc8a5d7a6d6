import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qurl.algorithms import grpo, token_weights
from qurl.config import AdvantageConfig, Aggregation

REWARDS = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=16)


def advantages(rewards, **config):
    return grpo(rewards, [1] * len(rewards), AdvantageConfig(**config))


def test_advantages_are_centered_rewards_over_the_unbiased_standard_deviation():
    rewards = [0.0, 1.0, 1.0, 0.5, -2.0]
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    assert advantages(rewards) == pytest.approx([(r - mean) / (std + 1e-6) for r in rewards], rel=1e-12)


def test_without_normalization_advantages_are_centered_rewards():
    assert advantages([0.0, 1.0, 2.0], normalize_std=False) == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("rewards", [[1.0], [0.0, 0.0], [0.1] * 7, [1 / 3] * 5])
def test_a_group_that_says_nothing_gets_exact_zeros(rewards, normalize_std):
    assert advantages(rewards, normalize_std=normalize_std) == [0.0] * len(rewards)


def test_an_empty_group_has_no_advantages():
    assert advantages([]) == []


@given(REWARDS)
def test_advantages_sum_to_zero_and_keep_the_order_of_the_rewards(rewards):
    result = advantages(rewards)
    assert abs(math.fsum(result)) < 1e-6  # |r| <= 1e3 rounds to 1e-13, divided by at least 1e-6
    order = sorted(range(len(rewards)), key=rewards.__getitem__)
    assert all(result[a] <= result[b] for a, b in zip(order, order[1:], strict=False))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="not all finite"):
        advantages([0.0, bad])


def test_a_length_is_needed_for_every_reward():
    with pytest.raises(ValueError, match="2 rewards but 1"):
        grpo([0.0, 1.0], [3], AdvantageConfig())


@given(st.lists(st.lists(st.floats(-10, 10), max_size=8), min_size=1, max_size=6))
def test_token_mean_is_the_mean_over_all_tokens(losses):
    weights = token_weights([len(x) for x in losses], Aggregation.token_mean)
    flat = [x for sequence in losses for x in sequence]
    expected = sum(flat) / len(flat) if flat else 0.0
    assert sum(w * sum(x) for w, x in zip(weights, losses, strict=True)) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.lists(st.floats(-10, 10), max_size=8), min_size=1, max_size=6))
def test_sequence_mean_is_the_mean_over_responses_of_their_means(losses):
    weights = token_weights([len(x) for x in losses], Aggregation.sequence_mean)
    means = [sum(x) / len(x) for x in losses if x]
    expected = sum(means) / len(means) if means else 0.0
    assert sum(w * sum(x) for w, x in zip(weights, losses, strict=True)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_a_negative_length_is_refused(aggregation):
    with pytest.raises(ValueError, match="negative"):
        token_weights([3, -1], aggregation)
