"""Held-out accuracy, sampled from the rollout engines as they are: same weights, same precision."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence

from qurl.config import EvaluationConfig, RolloutConfig
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
) -> dict[str, float]:
    """`eval/<name>/avg_at_k`, `.../response_length_mean` and `.../error_count` for each dataset.

    avg@k is the mean over problems of the mean reward of k samples. A failed reward call counts as wrong here, and is counted.
    progress: called with (done, total) problems."""
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
        groups = await asyncio.gather(*(one(name, prompt) for prompt in dataset))
        results = [result for scored in groups for result in scored.rewards]
        lengths = [len(rollout.token_ids) for scored in groups for rollout in scored.group.rollouts]
        metrics[f"eval/{name}/avg_at_k"] = statistics.fmean(result.value or 0.0 for result in results)
        metrics[f"eval/{name}/response_length_mean"] = statistics.fmean(lengths)
        metrics[f"eval/{name}/error_count"] = float(sum(result.value is None for result in results))
    return metrics
