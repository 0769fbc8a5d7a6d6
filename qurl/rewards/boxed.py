"""The last \\boxed{...} as text."""

from __future__ import annotations

from typing import Any

from qurl.rewards.answers import last_boxed, normalize_latex, reference_answer


def boxed(response: str, ground_truth: str, **extra: Any) -> float:
    """1.0 where the last box of the response equals the ground truth as text, after normalization of LaTeX spacing; else 0.0.

    No arithmetic: 1/2 is not 0.5; the reward "math" knows that. ValueError for an empty ground truth."""
    truth = normalize_latex(reference_answer(ground_truth))
    if not truth:
        raise ValueError(f"the ground truth {ground_truth[:80]!r} holds no answer")
    answer = last_boxed(response)
    return float(answer is not None and normalize_latex(answer) == truth)
