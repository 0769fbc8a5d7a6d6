"""A few rollouts of every step in readable form, chosen so that good, bad and failed ones are among them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from qurl.types import Prompt, RewardResult, Rollout, ScoredGroup

Candidate = tuple[Prompt, Rollout, RewardResult]


def write_rollouts(folder: Path, step: int, groups: Sequence[ScoredGroup], count: int) -> None:
    """Write `count` rollouts (fewer where there are fewer) to folder/step_NNNNNN.jsonl, replacing the file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_record(step, *candidate)) + "\n" for candidate in spread_over_rewards(groups, count)]
    (folder / f"step_{step:06d}.jsonl").write_text("".join(lines), encoding="utf-8")


def spread_over_rewards(groups: Sequence[ScoredGroup], count: int) -> list[Candidate]:
    """At most `count` rollouts in order of reward, failed ones (no reward) first.

    Takes turns over the reward values that occurred, or over `count` evenly spaced ones of them, lowest and highest included;
    within a value, other prompts come before other samples of the same prompt."""
    by_sample = zip_longest(*(zip(g.group.rollouts, g.rewards, strict=True) for g in groups))
    by_value: dict[float, list[Candidate]] = {}
    for row in by_sample:
        for scored, pair in zip(groups, row, strict=True):
            if pair is not None:
                value = float("-inf") if pair[1].value is None else pair[1].value
                by_value.setdefault(value, []).append((scored.group.prompt, *pair))
    values = sorted(by_value)
    if len(values) > count:
        values = [values[round(i * (len(values) - 1) / max(count - 1, 1))] for i in range(count)]
    turns = chain.from_iterable(zip_longest(*(by_value[v] for v in values)))
    chosen = [candidate for candidate in turns if candidate is not None][:count]
    return sorted(chosen, key=lambda c: float("-inf") if c[2].value is None else c[2].value)


def _record(step: int, prompt: Prompt, rollout: Rollout, reward: RewardResult) -> dict[str, Any]:
    logprobs = rollout.rollout_logprobs
    return {
        "step": step,
        "sample_id": f"{prompt.prompt_id}/{rollout.sample_index}",
        "data_source": prompt.data_source,
        "prompt": prompt.text,
        "response": rollout.text,
        "ground_truth": prompt.ground_truth,
        "reward": reward.value,
        "reward_error": reward.error,
        "finish_reason": rollout.finish_reason,
        "num_tokens": len(rollout.token_ids),
        "weight_version": rollout.weight_version,
        "mean_rollout_logprob": sum(logprobs) / len(logprobs) if logprobs else None,
    }
