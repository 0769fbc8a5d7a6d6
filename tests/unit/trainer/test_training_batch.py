"""From scored groups to samples and metrics."""

import pytest

from qurl.config import AlgorithmConfig
from qurl.errors import GuardStop
from qurl.observability.metrics import reduce_metrics
from qurl.trainer.batch import check_reward_errors, rollout_metrics, training_samples
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
    samples = training_samples([scored([1.0, 0.0])], AlgorithmConfig())
    good = samples[0]
    assert good.sample_id == "p/0"
    assert good.token_ids == [7, 8, 9, 5, 5]
    assert good.loss_mask == [False, False, False, True, True]
    assert good.rollout_logprobs == [0.0, 0.0, 0.0, -0.5, -0.5]
    assert good.advantages[:3] == [0.0] * 3 and good.advantages[3] == good.advantages[4] > 0
    assert good.advantages[3] == pytest.approx(-samples[1].advantages[3])
    assert good.weight_version == 3


def test_a_failed_reward_is_left_out_and_does_not_count_as_zero():
    with_error = training_samples([scored([1.0, 0.0, None])], AlgorithmConfig())
    without = training_samples([scored([1.0, 0.0])], AlgorithmConfig())
    assert [s.advantages for s in with_error] == [s.advantages for s in without]


def test_an_empty_response_is_not_trained():
    assert [s.sample_id for s in training_samples([scored([1.0, 0.0], lengths=[0, 2])], AlgorithmConfig())] == ["p/1"]


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
