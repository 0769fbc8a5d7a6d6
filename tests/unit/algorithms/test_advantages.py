import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qurl.algorithms import ADVANTAGES, RewardedGroup, token_weights
from qurl.config import AdvantageConfig, Aggregation, PolicyLossConfig

REWARDS = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=16)
GROUPS = st.lists(REWARDS, min_size=1, max_size=5)
WHITENED = ["reinforce_plus_plus", "reinforce_plus_plus_baseline"]
OF_THE_GROUP = ["grpo", "dr_grpo", "rloo"]


def advantages(name, rewards, lengths=None):
    lengths = lengths or [[1] * len(group) for group in rewards]
    groups = [RewardedGroup(rewards=r, lengths=n) for r, n in zip(rewards, lengths, strict=True)]
    return ADVANTAGES[name](groups, AdvantageConfig())


def slow(name, rewards, lengths):
    """Token by token, as each paper writes it."""
    if name == "grpo":
        return [[(r - statistics.mean(g)) / (statistics.stdev(g) + 1e-6) for r in g] for g in rewards]
    if name == "dr_grpo":
        return [[r - statistics.mean(g) for r in g] for g in rewards]
    if name == "rloo":
        return [[r - statistics.mean(g[:i] + g[i + 1 :]) for i, r in enumerate(g)] for g in rewards]
    if name == "gae":
        return rewards
    baselines = [statistics.mean(g) if name == "reinforce_plus_plus_baseline" else 0.0 for g in rewards]
    tokens = [
        r - baseline
        for g, ns, baseline in zip(rewards, lengths, baselines, strict=True)
        for r, n in zip(g, ns, strict=True)
        for _ in range(n)
    ]
    mean, variance = statistics.mean(tokens), statistics.variance(tokens)
    return [[(r - b - mean) / math.sqrt(variance + 1e-8) for r in g] for g, b in zip(rewards, baselines, strict=True)]


def random_iteration(seed=0):
    draw = random.Random(seed)
    rewards = [[draw.choice([-1.0, 0.0, 0.3, 1.0]) for _ in range(draw.randrange(2, 7))] + [0.5, 0.25] for _ in range(6)]
    return rewards, [[draw.randrange(1, 40) for _ in group] for group in rewards]


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_advantages_equal_a_slow_loop(name):
    rewards, lengths = random_iteration()
    for found, expected in zip(advantages(name, rewards, lengths), slow(name, rewards, lengths), strict=True):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", OF_THE_GROUP)
def test_groups_do_not_see_each_other(name):
    rewards, lengths = random_iteration()
    apart = [advantages(name, [r], [n])[0] for r, n in zip(rewards, lengths, strict=True)]
    assert advantages(name, rewards, lengths) == apart


@pytest.mark.parametrize("name", WHITENED)
def test_whitened_advantages_have_mean_zero_and_variance_one_over_tokens(name):
    rewards, lengths = random_iteration()
    found = advantages(name, rewards, lengths)
    tokens = [a for g, ns in zip(found, lengths, strict=True) for a, n in zip(g, ns, strict=True) for _ in range(n)]
    assert statistics.mean(tokens) == pytest.approx(0.0, abs=1e-12)
    assert statistics.variance(tokens) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("name", WHITENED)
def test_a_rollout_that_trains_no_token_does_not_count(name):
    with_it = advantages(name, [[0.0, 1.0, 2.0], [1.0, 5.0, 2.0]], [[3, 4, 2], [1, 0, 1]])
    if name == "reinforce_plus_plus":
        without = advantages(name, [[0.0, 1.0, 2.0], [1.0, 2.0]], [[3, 4, 2], [1, 1]])
        assert [with_it[0], [with_it[1][0], with_it[1][2]]] == without
    assert all(math.isfinite(a) for group in with_it for a in group)


@pytest.mark.parametrize("name", [*OF_THE_GROUP, *WHITENED])
@pytest.mark.parametrize("reward", [1.0, 0.1, 1 / 3])
def test_an_iteration_that_says_nothing_gets_exact_zeros(name, reward):
    assert advantages(name, [[reward] * 7, [], [reward] * 3]) == [[0.0] * 7, [], [0.0] * 3]


@pytest.mark.parametrize("name", OF_THE_GROUP)
def test_a_group_that_says_nothing_gets_exact_zeros_among_others(name):
    assert advantages(name, [[0.1] * 7, [0.0, 1.0], [2.0]])[::2] == [[0.0] * 7, [0.0]]


@given(GROUPS)
def test_advantages_within_a_group_sum_to_zero_and_keep_the_order_of_the_rewards(rewards):
    for name in ADVANTAGES:
        for group, result in zip(rewards, advantages(name, rewards), strict=True):
            if name in OF_THE_GROUP:
                assert abs(math.fsum(result)) < 1e-6  # |r| <= 1e3 rounds to 1e-13, divided by at least 1e-6
            order = sorted(range(len(group)), key=group.__getitem__)
            assert all(result[a] <= result[b] for a, b in zip(order, order[1:], strict=False))


@given(GROUPS, st.randoms())
def test_the_order_of_groups_does_not_matter(rewards, shuffler):
    order = list(range(len(rewards)))
    shuffler.shuffle(order)
    for name in ADVANTAGES:
        expected = advantages(name, rewards)
        assert advantages(name, [rewards[i] for i in order]) == [expected[i] for i in order]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="not all finite"):
        RewardedGroup(rewards=[0.0, bad], lengths=[1, 1])


def test_a_length_is_needed_for_every_reward():
    with pytest.raises(ValueError, match="2 rewards but 1"):
        RewardedGroup(rewards=[0.0, 1.0], lengths=[3])


LOSSES = st.lists(st.lists(st.floats(-10, 10), max_size=8), min_size=1, max_size=6)


def aggregated(losses, aggregation):
    config = PolicyLossConfig(aggregation=aggregation, aggregation_constant=5)
    weights = token_weights([len(x) for x in losses], config)
    return sum(w * sum(x) for w, x in zip(weights, losses, strict=True))


@given(LOSSES)
def test_token_mean_is_the_mean_over_all_tokens(losses):
    flat = [x for sequence in losses for x in sequence]
    expected = sum(flat) / len(flat) if flat else 0.0
    assert aggregated(losses, Aggregation.token_mean) == pytest.approx(expected, abs=1e-9)


@given(LOSSES)
def test_sequence_mean_is_the_mean_over_responses_of_their_means(losses):
    means = [sum(x) / len(x) for x in losses if x]
    expected = sum(means) / len(means) if means else 0.0
    assert aggregated(losses, Aggregation.sequence_mean) == pytest.approx(expected, abs=1e-9)


@given(LOSSES)
def test_constant_is_the_mean_over_responses_of_their_sums_over_the_constant(losses):
    sums = [sum(x) / 5 for x in losses if x]
    expected = sum(sums) / len(sums) if sums else 0.0
    assert aggregated(losses, Aggregation.constant) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_a_negative_length_is_refused(aggregation):
    with pytest.raises(ValueError, match="negative"):
        token_weights([3, -1], PolicyLossConfig(aggregation=aggregation, aggregation_constant=5))


def test_aggregation_by_a_constant_needs_one():
    with pytest.raises(ValueError, match=r"algorithm\.policy_loss\.aggregation_constant=None.*rollout\.max_response_tokens"):
        token_weights([3], PolicyLossConfig(aggregation=Aggregation.constant))
