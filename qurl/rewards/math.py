"""Mathematical answers compared as mathematics."""

from __future__ import annotations

import re
from typing import Any

from qurl.rewards.answers import accepted_answers, after_marker, after_thought, last_boxed
from qurl.rewards.equality import equals_any

TAIL_CHARACTERS = 1000  # of a response without a box, searched for its final answer
BOXLESS = ("none", "stated", "anywhere")
STATED = re.compile(r"(?:answer|solution)\s*(?:is|:|=)+\**\s*:?\s*(.+)", re.IGNORECASE)
LAST = re.compile(r"\$([^$]+)\$|\\\(((?:(?!\\\().)+)\\\)|(-?(?:\d[\d,]*)?\.?\d+(?:/\d+)?%?)")


def math(
    response: str,
    ground_truth: str,
    *,
    boxless: str = "stated",
    truncated: bool = False,
    prompt: str = "",
    finish_reason: str = "stop",
    **extra: Any,
) -> float:
    """1.0 where the answer of the response is mathematically equal to the ground truth; else 0.0.

    The answer is the last \\boxed{...} after any thought ("<think>...</think>"). A thought that is not finished holds no answer,
    nor does a response that was cut, unless `truncated` says so. boxless: what counts where there is no box at all: nothing
    ("none"), what follows "the answer is", "Answer:" or "####" at the end ("stated"), or the last formula or number ("anywhere").

    The ground truth is LaTeX ("\\frac{1}{2}"), a number ("142.0"), a worked solution that ends in a box or in "#### 7", or a list
    of alternatives written as a string ("['2', '3']"), of which one must be met. ValueError for an empty ground truth."""
    if boxless not in BOXLESS:
        raise ValueError(f"reward.kwargs.boxless={boxless!r} is unknown; use one of {', '.join(BOXLESS)}")
    truths = accepted_answers(ground_truth)
    answer = _answer(response, boxless, prompt.rstrip().endswith("<think>"))
    if answer is None or (finish_reason == "length" and not truncated):
        return 0.0
    return float(equals_any(answer, truths))


def _answer(response: str, boxless: str, is_thinking: bool) -> str | None:
    """Return the final answer; None where there is none. is_thinking: the prompt has opened the thought."""
    if is_thinking and "</think>" not in response:
        return None
    text = after_thought(response)
    boxed = last_boxed(text)
    if boxed is not None or boxless == "none":
        return boxed
    text = text.strip()[-TAIL_CHARACTERS:]
    marked = after_marker(text)
    if marked is not None:
        return marked
    stated = list(STATED.finditer(text))
    if stated and stated[-1].end() == len(text):
        return stated[-1][1].strip(" *\n").rstrip(".")
    if boxless == "anywhere":
        found = list(LAST.finditer(text))
        return next(filter(None, found[-1].groups()), None) if found else None
    return None
