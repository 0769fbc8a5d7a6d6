"""The reward that DeepScaleR was trained with."""

from __future__ import annotations

from typing import Any

from qurl.rewards.answers import accepted_answers, last_boxed
from qurl.rewards.ballots import ballot
from qurl.rewards.equality import equals_any

THOUGHT_END = "</think>"


def deepscaler(response: str, ground_truth: str, **extra: Any) -> float:
    """1.0 where the last \\boxed{...} after the first "</think>" is mathematically equal to the ground truth; else 0.0.

    Nothing before the end of the thought counts, and a response that never ends its thought is wrong. Ground truths are those of
    the reward "math"; ValueError for an empty one. Rules of rllm's RewardMathFn as used for DeepScaleR (agentica-project/rllm),
    with two differences: equality is that of the reward "math" and not mathd's and SymPy's, and a second "</think>" ends
    nothing."""
    truths = accepted_answers(ground_truth)
    _, _, solution = response.partition(THOUGHT_END)
    answer = last_boxed(solution)
    return float(answer is not None and equals_any(answer, truths))


def vote(response: str) -> str | None:
    """The content of the box that is scored, in one form for equal answers."""
    return ballot(last_boxed(response.partition(THOUGHT_END)[2]))
