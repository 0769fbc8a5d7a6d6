"""From scored groups to samples and metrics."""

import pytest

from qurl.config import AdvantageConfig, AlgorithmConfig, OverlongConfig
from qurl.errors import GuardStop
from qurl.observability.metrics import reduce_metrics
from qurl.trainer.batch import (
    check_reward_errors,
    is_informative,
    overlong_metrics,
    overlong_penalty,
    rollout_metrics,
    training_samples,
)
from qurl.types import Prompt, RewardResult, Rollout, RolloutGroup, ScoredGroup


def scored(rewards, *, lengths=None, versions=None, name="p"):
    lengths = lengths or [2] * len(rewards)
    versions = versions or [3] * len(rewards)
    prompt = Prompt(prompt_id=name, token_ids=[7, 8, 9], text="", ground_truth="", data_source="")
    rollouts = [
        Rollout(sample_index=i, token_ids=[5] * n, rollout_logprobs=[-0.5] * n, weight_versions=[v] * n,
                finish_reason="length" if n > 3 else "stop", text="", engine_id="0", seed=i)
        for i, (n, v) in enumerate(zip(lengths, versions, strict=True))
    ]  # fmt: skip
    results = [RewardResult(value=None, error="timeout after 10 s") if r is None else RewardResult(value=r) for r in rewards]
    return ScoredGroup(group=RolloutGroup(prompt=prompt, rollouts=rollouts), rewards=results)


def test_a_sample_lines_up_tokens_mask_logprobs_and_advantages():
    samples = training_samples([scored([1.0, 0.0])], AlgorithmConfig(), 8)
    good = samples[0]
    assert good.sample_id == "p/0"
    assert good.token_ids == [7, 8, 9, 5, 5]
    assert good.loss_mask == [False, False, False, True, True]
    assert good.rollout_logprobs == [0.0, 0.0, 0.0, -0.5, -0.5]
    assert good.advantages[:3] == [0.0] * 3 and good.advantages[3] == good.advantages[4] > 0
    assert good.advantages[3] == pytest.approx(-samples[1].advantages[3])
    assert good.weight_version == 3


def test_parts_of_rewards_are_metrics_and_acc_decides_what_is_right():
    results = [RewardResult(value=0.1, parts={"acc": 0.0, "mean": 2.0}), RewardResult(value=-1.0, parts={"acc": 1.0, "mean": 4.0})]
    values = reduce_metrics([rollout_metrics([ScoredGroup(group=scored([0.0, 0.0]).group, rewards=results)], version=3)])
    assert (values["reward/acc"], values["reward/part/mean"], values["reward/mean"]) == (0.5, 3.0, pytest.approx(-0.45))
    assert values["accuracy/train"] == 0.5
    assert [result.is_right for result in results] == [False, True]


def test_a_failed_reward_is_left_out_and_does_not_count_as_zero():
    with_error = training_samples([scored([1.0, 0.0, None])], AlgorithmConfig(), 8)
    without = training_samples([scored([1.0, 0.0])], AlgorithmConfig(), 8)
    assert [s.advantages for s in with_error] == [s.advantages for s in without]


def test_an_empty_response_is_not_trained():
    assert [s.sample_id for s in training_samples([scored([1.0, 0.0], lengths=[0, 2])], AlgorithmConfig(), 8)] == ["p/1"]


def test_metrics_count_errors_staleness_and_informative_groups():
    groups = [scored([1.0, 0.0], lengths=[2, 6], versions=[3, 1]), scored([1.0, 1.0]), scored([None, 0.0])]
    values = reduce_metrics([rollout_metrics(groups, version=4)])
    assert values["reward/error_count"] == 1
    assert values["reward/mean"] == pytest.approx(3 / 5)
    assert values["accuracy/train"] == pytest.approx(3 / 5)
    assert values["reward/informative_group_fraction"] == pytest.approx(1 / 3)
    assert values["rollout/staleness_max"] == 3
    assert values["rollout/truncated_fraction"] == pytest.approx(1 / 6)
    assert values["rollout/response_length_max"] == 6
    assert values["rollout/num_tokens"] == 16


def test_too_many_reward_errors_stop_the_run_and_quote_the_most_frequent():
    groups = [scored([1.0, None]), scored([None, 0.0])]
    check_reward_errors(groups, 0.5)
    with pytest.raises(GuardStop, match=r"2 of 4 reward calls failed \(reward.max_error_fraction=0.4\); most often: timeout"):
        check_reward_errors(groups, 0.4)


def test_the_length_penalty_is_that_of_dapo():
    """Eq. 13 of arXiv:2503.14476 with the paper's own numbers, case by case."""

    def paper(length, longest=20480, cache=4096):
        if length <= longest - cache:
            return 0.0
        return ((longest - cache) - length) / cache if length <= longest else -1.0

    config = OverlongConfig(penalty_tokens=4096)
    for length in (1, 16383, 16384, 16385, 18432, 20479, 20480):
        assert overlong_penalty(length, 20480, config) == pytest.approx(paper(length), abs=1e-12)
    assert overlong_penalty(18432, 20480, OverlongConfig(penalty_tokens=4096, penalty=3.0)) == -1.5
    assert overlong_penalty(20480, 20480, OverlongConfig()) == 0.0


def test_the_length_penalty_is_a_part_of_the_reward_that_advantages_are_made_of():
    config = AlgorithmConfig(advantage=AdvantageConfig(name="dr_grpo"), overlong=OverlongConfig(penalty_tokens=4))
    samples = training_samples([scored([1.0, 1.0], lengths=[2, 8])], config, 8)
    assert [sample.reward for sample in samples] == [1.0, 0.0]
    assert [sample.advantages[-1] for sample in samples] == [0.5, -0.5]
    values = reduce_metrics([overlong_metrics([scored([1.0, 1.0], lengths=[2, 8])], config.overlong, 8)])
    assert values == {"reward/overlong_penalty_mean": -0.5}


def test_a_filtered_response_is_not_trained_but_counts_in_its_group():
    groups = [scored([1.0, 0.0, 0.0], lengths=[2, 2, 6])]  # the last one is truncated
    whole = training_samples(groups, AlgorithmConfig(), 8)
    config = AlgorithmConfig(overlong=OverlongConfig(filter=True))
    assert training_samples(groups, config, 8) == whole[:2]
    assert reduce_metrics([overlong_metrics(groups, config.overlong, 8)]) == {"rollout/filtered_fraction": pytest.approx(1 / 3)}
    assert overlong_metrics(groups, OverlongConfig(), 8) == {}


@pytest.mark.parametrize(
    ("group", "overlong", "expected"),
    [
        (scored([1.0, 0.0]), OverlongConfig(), True),
        (scored([1.0, 1.0]), OverlongConfig(), False),
        (scored([None, 1.0]), OverlongConfig(), False),  # one known reward says nothing
        (scored([1.0, 0.0], lengths=[2, 0]), OverlongConfig(), False),  # an empty response is not trained
        (scored([1.0, 1.0], lengths=[2, 8]), OverlongConfig(penalty_tokens=4), False),  # they differ in length alone
        (scored([1.0, 0.0], lengths=[8, 8]), OverlongConfig(filter=True), False),  # all truncated, none left to train
        (scored([1.0, 0.0], lengths=[8, 2]), OverlongConfig(filter=True), True),
    ],
)
def test_a_group_is_informative_where_rewards_differ_and_something_is_left_to_train(group, overlong, expected):
    assert is_informative(group, AlgorithmConfig(overlong=overlong)) is expected
