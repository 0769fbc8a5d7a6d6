"""Mathematical answers compared as mathematics, by math-verify (parsing LaTeX to SymPy, then numeric and symbolic equality).

math-verify's own time limits are signals, which work in a main thread only and cannot interrupt C code. They are switched off
here: a call may take any time, and the reward pool kills it."""

from __future__ import annotations

import ast
from typing import Any

from qurl.rewards.answers import last_boxed, normalize_latex, reference_answer

TAIL_CHARACTERS = 1000  # of a response without a box, searched for its final answer


def math(response: str, ground_truth: str, **extra: Any) -> float:
    """1.0 where the answer of the response is mathematically equal to the ground truth; else 0.0.

    The answer is the last \\boxed{...}; where there is none at all, the final answer math-verify finds at the end of the text. The
    ground truth is LaTeX ("\\\\frac{1}{2}"), a number ("142.0"), a worked solution that ends in a box or in "#### 7", or a list of
    alternatives written as a string ("['2', '3']"), of which one must be met. ValueError for an empty ground truth."""
    truths = _alternatives(reference_answer(ground_truth))
    if not all(truths):
        raise ValueError(f"the ground truth {ground_truth[:80]!r} holds no answer")
    answer = last_boxed(response)
    if answer is not None:
        text = normalize_latex(answer)
        if not text or text in map(normalize_latex, truths):
            return float(bool(text))
    return float(any(_equal(truth, answer, response) for truth in truths))


def _alternatives(truth: str) -> list[str]:
    """The strings of a list written as Python writes one; an interval such as [0,3) or [1,2] is not such a list."""
    if truth.startswith("[") and truth.endswith("]"):
        try:
            values = ast.literal_eval(truth)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [truth]
        if values and all(isinstance(value, str) for value in values):
            return [value.strip() for value in values]
    return [truth]


def _equal(truth: str, answer: str | None, response: str) -> bool:
    from math_verify import parse, verify

    found = parse(response[-TAIL_CHARACTERS:] if answer is None else f"\\boxed{{{answer}}}", parsing_timeout=None)
    return verify(parse(f"\\boxed{{{truth}}}", parsing_timeout=None), found, timeout_seconds=None)
