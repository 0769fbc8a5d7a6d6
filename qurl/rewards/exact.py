"""Equality of text, for tasks whose answers are written in one way only."""

from __future__ import annotations

from typing import Any

from qurl.rewards.answers import after_marker, after_thought, alternatives, whole_number


def exact(response: str, ground_truth: str, **extra: Any) -> float:
    """1.0 where the response, or its final answer, is the ground truth, spaces around both stripped; else 0.0.

    The final answer is what follows the last "####", else the last line that is not blank; both only after any thought. A ground
    truth with "####" likewise counts from there on; one that is a list of strings gives alternatives; "72.0" and "072" stand for 72
    too, since data frames store integers so. ValueError for an empty ground truth."""
    marked_truth = after_marker(ground_truth)
    truths = alternatives(ground_truth if marked_truth is None else marked_truth)
    given = {after_thought(response).strip(), vote(response)}
    return float(not given.isdisjoint([*truths, *map(whole_number, truths)]))


def vote(response: str) -> str | None:
    """The final answer; None where the response is blank, ends with the mark or is an unfinished thought."""
    text = after_thought(response).strip()
    answer = after_marker(text)
    return (text.rpartition("\n")[2].strip() if answer is None else answer) or None
