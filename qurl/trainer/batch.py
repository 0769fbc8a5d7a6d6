"""From scored groups to training samples, and what an iteration's rollouts say about themselves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from qurl.algorithms import ADVANTAGES, RewardedGroup
from qurl.config import AlgorithmConfig
from qurl.errors import GuardStop
from qurl.observability.metrics import Last, Max, Mean, Metric, Sum
from qurl.plug import resolve
from qurl.types import Rollout, RolloutGroup, ScoredGroup, TrainingSample


def training_samples(groups: Sequence[ScoredGroup], config: AlgorithmConfig) -> list[TrainingSample]:
    """One sample per rollout with a reward and at least one token, in group order.

    A rollout whose reward call failed is left out of its group's advantage and of training: its reward is unknown, not 0."""
    advantage = resolve(ADVANTAGES, config.advantage.name, "algorithm.advantage.name")
    kept = [
        [
            (rollout, result.value)
            for rollout, result in zip(scored.group.rollouts, scored.rewards, strict=True)
            if result.value is not None and rollout.token_ids
        ]
        for scored in groups
    ]
    advantages = advantage(
        [RewardedGroup(rewards=[value for _, value in pairs], lengths=[len(r.token_ids) for r, _ in pairs]) for pairs in kept],
        config.advantage,
    )
    return [
        _sample(scored.group, rollout, value, worth)
        for scored, pairs, of_group in zip(groups, kept, advantages, strict=True)
        for (rollout, value), worth in zip(pairs, of_group, strict=True)
    ]


def _sample(group: RolloutGroup, rollout: Rollout, reward: float, advantage: float) -> TrainingSample:
    prompt = group.prompt.token_ids
    before = len(prompt)
    response = len(rollout.token_ids)
    return TrainingSample(
        sample_id=f"{group.prompt.prompt_id}/{rollout.sample_index}",
        token_ids=prompt + rollout.token_ids,
        loss_mask=[False] * before + [True] * response,
        rollout_logprobs=[0.0] * before + rollout.rollout_logprobs,
        advantages=[0.0] * before + [advantage] * response,
        reward=reward,
        weight_version=rollout.weight_version,
    )


def rollout_metrics(groups: Sequence[ScoredGroup], version: int) -> dict[str, Metric]:
    """reward/, accuracy/ and rollout/ metrics. version: the weights about to be trained."""
    rollouts = [rollout for scored in groups for rollout in scored.group.rollouts]
    rewards = [[result.value for result in scored.rewards if result.value is not None] for scored in groups]
    flat = [value for group in rewards for value in group]
    num_errors = sum(result.value is None for scored in groups for result in scored.rewards)
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    metrics: dict[str, Metric] = {
        "reward/error_count": Sum(num_errors),
        "rollout/num_tokens": Sum(sum(lengths)),
        "rollout/response_length_mean": Mean(statistics.fmean(lengths), weight=len(lengths)),
        "rollout/response_length_max": Max(max(lengths)),
        "rollout/truncated_fraction": Mean(statistics.fmean(r.finish_reason == "length" for r in rollouts), weight=len(rollouts)),
        "rollout/staleness_max": Max(max((version - r.weight_version for r in rollouts if r.token_ids), default=0)),
        "sync/weight_version": Last(version),
    }
    if flat:
        metrics |= {
            "reward/mean": Mean(statistics.fmean(flat), weight=len(flat)),
            "reward/std_in_group": Mean(statistics.fmean(statistics.pstdev(group) for group in rewards if group)),
            "reward/informative_group_fraction": Mean(statistics.fmean(len(set(group)) > 1 for group in rewards)),
            "accuracy/train": Mean(statistics.fmean(value > 0 for value in flat), weight=len(flat)),
        }
    return metrics


def check_reward_errors(groups: Sequence[ScoredGroup], max_error_fraction: float) -> None:
    """Raises GuardStop where more reward calls failed than reward.max_error_fraction allows; quotes one of them."""
    results = [result for scored in groups for result in scored.rewards]
    errors = [result.error for result in results if result.error is not None]
    if len(errors) > max_error_fraction * len(results):
        common = statistics.mode(errors)
        raise GuardStop(
            f"{len(errors)} of {len(results)} reward calls failed (reward.max_error_fraction={max_error_fraction:g}); "
            f"most often: {common}"
        )
