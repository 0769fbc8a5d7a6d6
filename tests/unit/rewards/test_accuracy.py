"""avg@k, pass@k, maj@k and intervals against slow enumerations."""

from __future__ import annotations

import itertools
import random

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qurl.rewards.accuracy import avg_at_k, estimate, is_right, maj_at_k, pass_at_k, percentile

RIGHT = st.lists(st.booleans(), min_size=1, max_size=9)


def test_right_means_a_positive_reward_whatever_wrong_and_unknown_are_worth():
    assert [is_right(reward) for reward in (1.0, 0.5, 0.0, -1.0, None)] == [True, True, False, False, False]


@settings(deadline=None)
@given(RIGHT)
def test_pass_at_k_is_the_mean_over_all_subsets(right):
    for k in range(1, len(right) + 1):
        subsets = [any(subset) for subset in itertools.combinations(right, k)]
        assert pass_at_k(right, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)
    assert pass_at_k(right, 1) == pytest.approx(avg_at_k(right), abs=1e-12)


def test_pass_at_k_needs_k_samples_and_stands_many():
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"pass@{k} cannot be estimated from 3 samples"):
            pass_at_k([True, False, False], k)
    assert pass_at_k([True] * 10 + [False] * 9990, 5000) == pytest.approx(1 - 0.5**10, abs=1e-3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["a", "b", "c", None])), min_size=1, max_size=8))
def test_maj_at_k_is_the_mean_over_all_ways_to_break_ties(samples):
    right, votes = [r for r, _ in samples], [v for _, v in samples]
    counts = {vote: votes.count(vote) for vote in votes if vote is not None}
    winners = [vote for vote in counts if counts[vote] == max(counts.values())]
    drawn = []
    for winner in winners:  # an answer is drawn, then one of its samples
        of_winner = [r for r, v in samples if v == winner]
        drawn.append(sum(of_winner) / len(of_winner))
    assert maj_at_k(right, votes) == pytest.approx(sum(drawn) / len(drawn) if drawn else 0.0, abs=1e-12)


def test_a_majority_may_be_right_where_most_samples_are_wrong():
    assert maj_at_k([True, True, False, False, False], ["7", "7", "1", "2", None]) == 1.0
    assert maj_at_k([True, False], ["7", "8"]) == 0.5
    assert maj_at_k([False], [None]) == 0.0


def test_the_interval_is_a_bootstrap_over_problems():
    values = [0.0, 0.25, 0.5, 1.0, 1.0, 0.75, 0.0, 0.5, 0.25, 1.0]
    found = estimate(values, seed=3)
    generator, means = random.Random(3), []
    for _ in range(2000):  # the same draws, one problem at a time, in another order of summation
        drawn = generator.choices(range(len(values)), k=len(values))
        means.append(sum(values[index] for index in reversed(drawn)) / len(drawn))
    assert found.value == pytest.approx(sum(values) / 10)
    assert (found.low, found.high) == pytest.approx(tuple(numpy.percentile(means, [2.5, 97.5])))
    assert estimate(values, seed=3) == found != estimate(values, seed=4)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator, hits = random.Random(0), 0
    for trial in range(100):
        chances = [generator.random() for _ in range(60)]  # problems from a population whose mean is 0.5
        values = [sum(generator.random() < chance for _ in range(8)) / 8 for chance in chances]
        found = estimate(values, seed=trial)
        hits += found.low <= 0.5 <= found.high
    assert hits >= 88  # of 100 at 95 %; fewer has a probability of 0.2 %


def test_an_interval_of_equal_values_is_not_empty():
    found = estimate([0.0] * 30, seed=0)
    assert (found.value, found.low) == (0.0, 0.0)
    assert (1 - found.high) ** 30 == pytest.approx(0.025)
    assert estimate([1.0] * 30, seed=0).low == pytest.approx(1 - found.high)
    partial = estimate([0.5] * 30, seed=0)
    assert (partial.low, partial.high) == (0.5, 0.5)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0, 1))
def test_percentiles_are_numpys(values, fraction):
    assert percentile(sorted(values), fraction) == pytest.approx(float(numpy.quantile(values, fraction)), abs=1e-9)
