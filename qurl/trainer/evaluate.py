"""Held-out accuracy, sampled from the rollout engines as they are: same weights, same precision."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence

from qurl.config import EvaluationConfig, RolloutConfig
from qurl.rewards.accuracy import avg_at_k, maj_at_k, pass_at_k
from qurl.rollout.pool import RolloutPool
from qurl.rollout.request import Sampling
from qurl.types import Prompt, RolloutGroup, ScoredGroup


def evaluation_sampling(config: EvaluationConfig, rollout: RolloutConfig, stop_token_ids: Sequence[int]) -> Sampling:
    """What evaluation samples with; temperature 0 is greedy."""
    return Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=-1,
        max_tokens=config.max_response_tokens or rollout.max_response_tokens,
        stop_token_ids=tuple(sorted({*stop_token_ids, *rollout.stop_token_ids})),
    )


async def evaluate(
    prompts: Mapping[str, Sequence[Prompt]],
    progress: Callable[[int, int], None],
    *,
    pool: RolloutPool,
    score: Callable[[RolloutGroup], Awaitable[ScoredGroup]],
    sampling: Sampling,
    num_samples: int,
    vote: Callable[[str], str | None] | None,
) -> dict[str, float]:
    """The metrics of `dataset_metrics` for each dataset.

    vote: of the reward function (qurl.rewards.VOTES); None where it has none. progress: called with (done, total) problems."""
    total = sum(len(p) for p in prompts.values())
    done = 0

    async def one(name: str, prompt: Prompt) -> ScoredGroup:
        nonlocal done
        group = await pool.generate(prompt, sampling, num_samples, request_id=f"eval/{name}/{prompt.prompt_id}")
        scored = await score(group)
        done += 1
        progress(done, total)
        return scored

    metrics: dict[str, float] = {}
    for name, dataset in prompts.items():
        metrics |= dataset_metrics(name, await asyncio.gather(*(one(name, prompt) for prompt in dataset)), vote)
    return metrics


def dataset_metrics(name: str, groups: Sequence[ScoredGroup], vote: Callable[[str], str | None] | None) -> dict[str, float]:
    """`eval/<name>/` avg_at_k, response_length_mean and error_count; with several samples also pass_at_k and, with a
    vote, maj_at_k. k is the number of samples; see qurl.rewards.accuracy.

    Accuracies, whatever the reward gives a wrong answer. A failed reward call counts as wrong, and is counted."""
    results = [result for scored in groups for result in scored.rewards]
    right = [[result.is_right for result in scored.rewards] for scored in groups]
    num_samples = len(right[0])
    metrics = {
        "avg_at_k": statistics.fmean(map(avg_at_k, right)),
        "response_length_mean": statistics.fmean(len(rollout.token_ids) for scored in groups for rollout in scored.group.rollouts),
        "error_count": float(sum(result.value is None for result in results)),
    }
    if num_samples > 1:
        metrics["pass_at_k"] = statistics.fmean(pass_at_k(flags, num_samples) for flags in right)
        if vote is not None:
            votes = [[vote(rollout.text) for rollout in scored.group.rollouts] for scored in groups]
            metrics["maj_at_k"] = statistics.fmean(map(maj_at_k, right, votes))
    return {f"eval/{name}/{key}": value for key, value in metrics.items()}
