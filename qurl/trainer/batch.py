"""From scored groups to training samples, and what an iteration's rollouts say about themselves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from qurl.algorithms import ADVANTAGES, RewardedGroup
from qurl.config import AlgorithmConfig, OverlongConfig
from qurl.errors import GuardStop
from qurl.observability.metrics import METRICS, Last, Max, Mean, Metric, Sum
from qurl.plug import resolve
from qurl.trainer.repetition import ends_in_loop
from qurl.types import Rollout, RolloutGroup, ScoredGroup, TrainingSample


def training_samples(groups: Sequence[ScoredGroup], config: AlgorithmConfig, max_response_tokens: int) -> list[TrainingSample]:
    """One sample per trained rollout, in group order. max_response_tokens: the bound that these rollouts were sampled under.

    A rollout whose reward call failed is left out of its group's advantage and of training: its reward is unknown, not 0. One that
    algorithm.overlong.filter leaves out of training still counts in its group's advantage."""
    advantage = resolve(ADVANTAGES, config.advantage.name, "algorithm.advantage.name")
    kept = [
        [
            (rollout, value + overlong_penalty(len(rollout.token_ids), max_response_tokens, config.overlong))
            for rollout, value in _known(scored)
        ]
        for scored in groups
    ]
    advantages = advantage(
        [RewardedGroup(rewards=[value for _, value in pairs], lengths=[len(r.token_ids) for r, _ in pairs]) for pairs in kept],
        config.advantage,
    )
    return [
        training_sample(scored.group, rollout, value, worth)
        for scored, pairs, of_group in zip(groups, kept, advantages, strict=True)
        for (rollout, value), worth in zip(pairs, of_group, strict=True)
        if not _is_filtered(rollout, config.overlong)
    ]


def spread_out(samples: Sequence[TrainingSample], count: int) -> list[TrainingSample]:
    """`count` of the samples, or all, evenly spaced."""
    count = min(count, len(samples))
    return [samples[i * len(samples) // count] for i in range(count)]


def overlong_penalty(length: int, max_response_tokens: int, config: OverlongConfig) -> float:
    """Soft overlong punishment of a response of `length` tokens, in [-config.penalty, 0].

    0 up to max_response_tokens - penalty_tokens, then linear, -penalty at max_response_tokens. Yu et al. 2025 (DAPO,
    arXiv:2503.14476) eq. 13 with L_max = max_response_tokens and L_cache = penalty_tokens; the factor is verl's."""
    if not config.penalty_tokens:
        return 0.0
    beyond = length - (max_response_tokens - config.penalty_tokens)
    return -config.penalty * min(1.0, max(0, beyond) / config.penalty_tokens)


def is_informative(scored: ScoredGroup, config: AlgorithmConfig) -> bool:
    """Rewards differ, and a rollout is left to train: what dynamic sampling keeps. The length penalty does not make them differ.

    Yu et al. 2025 (DAPO, arXiv:2503.14476) eq. 11 asks for right and wrong answers in a group; this asks the same of any reward."""
    known = _known(scored)
    return len({value for _, value in known}) > 1 and not all(_is_filtered(rollout, config.overlong) for rollout, _ in known)


def _known(scored: ScoredGroup) -> list[tuple[Rollout, float]]:
    """Rollouts with a token and a reward."""
    return [
        (rollout, result.value)
        for rollout, result in zip(scored.group.rollouts, scored.rewards, strict=True)
        if result.value is not None and rollout.token_ids
    ]


def _is_filtered(rollout: Rollout, config: OverlongConfig) -> bool:
    return config.filter and rollout.finish_reason == "length"


def training_sample(group: RolloutGroup, rollout: Rollout, reward: float, advantage: float) -> TrainingSample:
    """Return prompt and response as one sequence whose response is trained."""
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
        kept_tokens=rollout.kept_tokens,
    )


def rollout_metrics(groups: Sequence[ScoredGroup], version: int) -> dict[str, Metric]:
    """reward/, accuracy/ and rollout/ metrics. version: the weights about to be trained."""
    rollouts = [rollout for scored in groups for rollout in scored.group.rollouts]
    rewards = [[result.value for result in scored.rewards if result.value is not None] for scored in groups]
    flat = [value for group in rewards for value in group]
    results = [result for scored in groups for result in scored.rewards]
    num_errors = sum(result.value is None for result in results)
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    metrics: dict[str, Metric] = {
        "reward/error_count": Sum(num_errors),
        "rollout/num_tokens": Sum(sum(lengths)),
        "rollout/response_length_mean": Mean(statistics.fmean(lengths), weight=len(lengths)),
        "rollout/response_length_max": Max(max(lengths)),
        "rollout/truncated_fraction": Mean(statistics.fmean(r.finish_reason == "length" for r in rollouts), weight=len(rollouts)),
        "rollout/repetition_fraction": Mean(statistics.fmean(ends_in_loop(r.token_ids) for r in rollouts), weight=len(rollouts)),
        "rollout/staleness_max": Max(max((version - r.weight_version for r in rollouts if r.token_ids), default=0)),
        "sync/weight_version": Last(version),
    }
    kept = [rollout.kept_tokens for rollout in rollouts if rollout.kept_tokens is not None]
    if num_kept := sum(len(sets.sizes) for sets in kept):
        mean = sum(int(sets.sizes.sum()) for sets in kept) / num_kept
        metrics["rollout/kept_tokens_mean"] = Mean(mean, weight=num_kept)
    if flat:
        metrics |= {
            "reward/mean": Mean(statistics.fmean(flat), weight=len(flat)),
            "reward/std_in_group": Mean(statistics.fmean(statistics.pstdev(group) for group in rewards if group)),
            "reward/informative_group_fraction": Mean(statistics.fmean(len(set(group)) > 1 for group in rewards)),
            "accuracy/train": Mean(sum(result.is_right for result in results) / len(flat), weight=len(flat)),
        }
    return metrics | part_metrics(groups)


def part_metrics(groups: Sequence[ScoredGroup]) -> dict[str, Metric]:
    """Return the mean of each number that a reward function returned beside its score, as `reward/<name>`.

    A name that qurl uses itself, such as `mean`, becomes `reward/part/<name>`."""
    values: dict[str, list[float]] = {}
    for result in (result for scored in groups for result in scored.rewards):
        for name, value in result.parts.items():
            values.setdefault(name, []).append(value)
    keys = {name: f"reward/part/{name}" if f"reward/{name}" in METRICS else f"reward/{name}" for name in values}
    return {keys[name]: Mean(statistics.fmean(found), weight=len(found)) for name, found in values.items()}


def overlong_metrics(groups: Sequence[ScoredGroup], config: OverlongConfig, max_response_tokens: int) -> dict[str, Metric]:
    """What algorithm.overlong did to the iteration's rollouts; nothing where it is off."""
    rollouts = [rollout for scored in groups for rollout, _ in _known(scored)]
    metrics: dict[str, Metric] = {}
    if rollouts and config.penalty_tokens:
        penalties = [overlong_penalty(len(rollout.token_ids), max_response_tokens, config) for rollout in rollouts]
        metrics["reward/overlong_penalty_mean"] = Mean(statistics.fmean(penalties), weight=len(penalties))
    if rollouts and config.filter:
        filtered = [_is_filtered(rollout, config) for rollout in rollouts]
        metrics["rollout/filtered_fraction"] = Mean(statistics.fmean(filtered), weight=len(filtered))
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
