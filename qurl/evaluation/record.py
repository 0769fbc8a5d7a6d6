"""One finished problem: what is written to the journal, and all that metrics are computed from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from qurl.types import ScoredGroup

MAX_VOTE_CHARACTERS = 200  # of a vote as stored; a longer one is stored as its hash


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemRecord:
    """A problem's samples; the lists are in sample order and equally long."""

    benchmark: str
    problem: str  # prompt_id
    ground_truth: str
    rewards: list[float | None]  # None: the reward call failed
    errors: list[str | None]  # why it failed
    votes: list[str | None]  # qurl.rewards.VOTES; None also where the reward function is somebody's own
    num_tokens: list[int]
    truncated: list[bool]  # cut at max_tokens
    responses: list[str]


def record_of(benchmark: str, scored: ScoredGroup, vote: Callable[[str], str | None] | None) -> ProblemRecord:
    """vote: of the benchmark's reward function; None where it has none."""
    rollouts = scored.group.rollouts
    return ProblemRecord(
        benchmark=benchmark,
        problem=scored.group.prompt.prompt_id,
        ground_truth=scored.group.prompt.ground_truth,
        rewards=[result.value for result in scored.rewards],
        errors=[result.error for result in scored.rewards],
        votes=[None if vote is None else _short(vote(rollout.text)) for rollout in rollouts],
        num_tokens=[len(rollout.token_ids) for rollout in rollouts],
        truncated=[rollout.finish_reason == "length" for rollout in rollouts],
        responses=[rollout.text for rollout in rollouts],
    )


def _short(vote: str | None) -> str | None:
    if vote is None or len(vote) <= MAX_VOTE_CHARACTERS:
        return vote
    return "blake2b:" + hashlib.blake2b(vote.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
