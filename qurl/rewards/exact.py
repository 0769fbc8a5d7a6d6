"""Equality of text, for tasks whose answers are written in one way only."""

from __future__ import annotations

from typing import Any

from qurl.rewards.answers import after_marker


def exact(response: str, ground_truth: str, **extra: Any) -> float:
    """1.0 where the response, or its final answer, is the ground truth, spaces around both stripped; else 0.0.

    The final answer is what follows the last "####", else the last line that is not blank; a ground truth with "####" likewise
    counts from there on. ValueError for an empty ground truth."""
    marked_truth = after_marker(ground_truth)
    truth = ground_truth.strip() if marked_truth is None else marked_truth
    if not truth:
        raise ValueError(f"the ground truth {ground_truth[:80]!r} holds no answer")
    return float(truth in (response.strip(), vote(response)))


def vote(response: str) -> str | None:
    """The final answer; None where the response is blank or ends with the mark."""
    text = response.strip()
    answer = after_marker(text)
    return (text.rpartition("\n")[2].strip() if answer is None else answer) or None
