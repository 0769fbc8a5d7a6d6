import json

import pytest

from qurl.observability.recorder import spread_over_rewards, write_rollouts
from qurl.types import Prompt, RewardResult, Rollout, RolloutGroup, ScoredGroup


def group(prompt_id, rewards):
    """One rollout per reward; None is a failed reward call."""
    prompt = Prompt(prompt_id=prompt_id, token_ids=[1], text="2+2=", ground_truth="4", data_source="sums")
    rollouts = [
        Rollout(sample_index=i, token_ids=[5, 6], rollout_logprobs=[-1.0, -2.0], weight_versions=[3, 4], finish_reason="stop",
                text="4 \ud800", engine_id="e0", seed=i)
        for i in range(len(rewards))
    ]  # fmt: skip
    results = [RewardResult(value=r) if r is not None else RewardResult(value=None, error="timeout") for r in rewards]
    return ScoredGroup(group=RolloutGroup(prompt=prompt, rollouts=rollouts), rewards=results)


def chosen(groups, count):
    return [(p.prompt_id, rollout.sample_index, reward.value) for p, rollout, reward in spread_over_rewards(groups, count)]


def test_rare_rewards_are_among_the_chosen():
    groups = [group("a", [0.0] * 8), group("b", [0.0] * 7 + [1.0])]
    assert chosen(groups, 4) == [("a", 0, 0.0), ("b", 0, 0.0), ("a", 1, 0.0), ("b", 7, 1.0)]


def test_of_many_rewards_the_lowest_the_highest_and_evenly_spaced_ones_are_chosen():
    assert [r for *_, r in chosen([group("a", [float(x) for x in range(9)])], 3)] == [0.0, 4.0, 8.0]


def test_a_failed_reward_counts_as_a_value_of_its_own():
    assert [r for *_, r in chosen([group("a", [1.0, None, 0.0])], 3)] == [None, 0.0, 1.0]


@pytest.mark.parametrize("groups", [[], [group("a", [])]])
def test_nothing_sampled_gives_nothing(groups):
    assert chosen(groups, 4) == []


def test_fewer_rollouts_than_asked_for_are_all_chosen_once():
    groups = [group("a", [0.0, 1.0]), group("b", [0.5])]
    assert sorted(chosen(groups, 10)) == [("a", 0, 0.0), ("a", 1, 1.0), ("b", 0, 0.5)]


def test_a_record_says_what_a_person_wants_to_know(tmp_path):
    write_rollouts(tmp_path / "rollouts", 12, [group("a", [1.0])], 4)
    (line,) = (tmp_path / "rollouts" / "step_000012.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 12, "sample_id": "a/0", "data_source": "sums", "prompt": "2+2=", "response": "4 \ud800", "ground_truth": "4",
        "reward": 1.0, "reward_error": None, "finish_reason": "stop", "num_tokens": 2, "weight_version": 3,
        "mean_rollout_logprob": -1.5,
    }  # fmt: skip
