"""The last \\boxed{...} as text."""

from __future__ import annotations

from typing import Any

from qurl.rewards.answers import accepted_answers, after_thought, boxed_answer, normalize_latex, whole_number


def boxed(response: str, ground_truth: str, **extra: Any) -> float:
    """1.0 where the last box after any thought equals the ground truth as text, after normalization of LaTeX spacing; else 0.0.

    No arithmetic: 1/2 is not 0.5; the reward "math" knows that. Of numbers only "72.0" is 72 and "033" is 33. A ground truth may be
    a worked solution or a list of alternatives, as for the reward "math". ValueError for an empty ground truth."""
    truths = [whole_number(normalize_latex(truth)) for truth in accepted_answers(ground_truth)]
    if not all(truths):
        raise ValueError(f"the ground truth {ground_truth[:80]!r} holds no answer")
    return float(vote(response) in truths)


def vote(response: str) -> str | None:
    """Return the normalized content of the box that is scored; None where there is none or it is empty."""
    return boxed_answer(after_thought(response))
