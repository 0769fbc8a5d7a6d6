"""The form in which each of qurl's own rewards wants an answer, and what a wrong one gets."""

from __future__ import annotations

from qurl.rewards.answers import after_marker, alternatives, reference_answer

FORMS: dict[str, str] = {
    "boxed": "\\boxed{%s}",
    "dapo": "Answer: %s",
    "deepscaler": "</think>\\boxed{%s}",
    "exact": "%s",
    "gsm8k": "#### %s",
    "math": "\\boxed{%s}",
}
"""Reward of qurl.rewards.REWARDS -> the shortest response that states the answer %s."""

WRONG: dict[str, float] = {name: -1.0 if name == "dapo" else 0.0 for name in FORMS}
"""Reward of qurl.rewards.REWARDS -> what a wrong answer gets."""


def stated(name: str, ground_truth: str) -> str:
    """Return a response that gives the ground truth, or the first of its alternatives, in the form of the reward `name`.

    Example:
        >>> stated("gsm8k", "48+24=72\\n#### 72")
        '#### 72'
    """
    marked = after_marker(ground_truth) if name == "exact" else reference_answer(ground_truth)
    answer = ground_truth if marked is None else marked
    return FORMS[name] % (alternatives(answer)[0] if answer.strip() else "")
