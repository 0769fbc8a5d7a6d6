"""Mathematical answers compared as mathematics."""

from __future__ import annotations

from typing import Any

from qurl.rewards.answers import accepted_answers, last_boxed
from qurl.rewards.equality import equals_any, found_equals_any

TAIL_CHARACTERS = 1000  # of a response without a box, searched for its final answer


def math(response: str, ground_truth: str, **extra: Any) -> float:
    """1.0 where the answer of the response is mathematically equal to the ground truth; else 0.0.

    The answer is the last \\boxed{...}; where there is none at all, the final answer math-verify finds at the end of the text. The
    ground truth is LaTeX ("\\\\frac{1}{2}"), a number ("142.0"), a worked solution that ends in a box or in "#### 7", or a list of
    alternatives written as a string ("['2', '3']"), of which one must be met. ValueError for an empty ground truth."""
    truths = accepted_answers(ground_truth)
    answer = last_boxed(response)
    if answer is None:
        return float(found_equals_any(response[-TAIL_CHARACTERS:], truths))
    return float(equals_any(answer, truths))
