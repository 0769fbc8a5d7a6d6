"""Warnings that name the key, once per occurrence."""

import logging

import pytest

from qurl.trainer.symptoms import PATIENCE, Symptoms
from qurl.types import Prompt, RewardResult, Rollout, RolloutGroup, ScoredGroup


def scored_group(rewards, reasons):
    """A prompt's responses; None is a reward whose call failed."""
    prompt = Prompt(prompt_id="p", token_ids=[7], text="", ground_truth="", data_source="")
    rollouts = [
        Rollout(
            sample_index=i, token_ids=[5, 5], rollout_logprobs=[-0.5] * 2, weight_versions=[0, 0], finish_reason=reason, text="",
            engine_id="0", seed=i,
        )
        for i, reason in enumerate(reasons)
    ]
    results = [RewardResult(value=None, error="timeout") if r is None else RewardResult(value=r) for r in rewards]
    return ScoredGroup(group=RolloutGroup(prompt=prompt, rollouts=rollouts), rewards=results)


def warnings_of(caplog, iterations, limit=8):
    """What is said of each iteration's groups."""
    symptoms, found = Symptoms(), []
    for step, groups in enumerate(iterations):
        caplog.clear()
        symptoms.look(step, groups, limit)
        found.append([record.getMessage() for record in caplog.records if record.levelno == logging.WARNING])
    return found


@pytest.mark.parametrize("num_cut, is_told", [(0, False), (6, False), (7, True), (8, True)])  # of 8: 75, 88 and 100 %
def test_responses_that_are_nearly_all_cut_are_told_once_with_the_key(caplog, num_cut, is_told):
    reasons = ["length"] * num_cut + ["stop"] * (8 - num_cut)
    cut, whole = [scored_group([0.0, 1.0] * 4, reasons)], [scored_group([0.0, 1.0], ["stop"] * 2)]
    found = warnings_of(caplog, [cut, cut, whole, cut])
    assert [len(lines) for lines in found] == [int(is_told), 0, 0, int(is_told)]
    if is_told:
        assert f"{num_cut} of 8 responses were cut at rollout.max_response_tokens=8" in found[0][0]


@pytest.mark.parametrize("groups, said", [
    ([[0.0, 0.0], [0.0, 0.0]], "all rewards are 0,"),
    ([[1.0, 1.0], [0.0, 0.0]], "rewards are equal within each prompt's responses"),
    ([[0.5], [0.5]], "all rewards are 0.5"),
])
def test_rewards_that_stay_equal_are_told_after_three_iterations_and_again_when_they_were_not(caplog, groups, said):
    equal = [scored_group(rewards, ["stop"] * len(rewards)) for rewards in groups]
    other = [scored_group([0.0, 1.0], ["stop"] * 2)]
    found = warnings_of(caplog, [equal] * (PATIENCE + 2) + [other] + [equal] * PATIENCE)
    assert [len(lines) for lines in found] == [0] * (PATIENCE - 1) + [1, 0, 0, 0] + [0] * (PATIENCE - 1) + [1]
    assert said in found[PATIENCE - 1][0] and "reward.function" in found[PATIENCE - 1][0]


def test_rewards_of_single_responses_that_differ_are_no_symptom(caplog):
    groups = [scored_group([value], ["stop"]) for value in (0.0, 1.0)]
    assert warnings_of(caplog, [groups] * (2 * PATIENCE)) == [[]] * (2 * PATIENCE)


def test_unknown_rewards_are_no_symptom(caplog):
    assert warnings_of(caplog, [[scored_group([None, None], ["stop"] * 2)]] * (2 * PATIENCE)) == [[]] * (2 * PATIENCE)


def test_skipped_mini_batches_are_told_each_time(caplog):
    with caplog.at_level(logging.INFO, logger="qurl"):
        Symptoms().tell_skipped(4, {"policy/num_skipped_mini_batches": 1.0}, 2)
        Symptoms().tell_skipped(5, {"policy/num_skipped_mini_batches": 0.0}, 2)
    assert [r.getMessage() for r in caplog.records] == [
        "iteration 4: all advantages are 0 in 1 of 2 mini-batches; forward and backward were skipped, and the optimizer stepped "
        "with a gradient of zero"
    ]
