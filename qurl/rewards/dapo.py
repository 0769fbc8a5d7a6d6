"""The reward that DAPO was trained with: a last line "Answer: ..." that equals the ground truth as normalized text.

The normalization is that of Lewkowycz et al. 2022 (Minerva, arXiv:2206.14858, appendix D.1), the one that verl's math_dapo applies
for Yu et al. 2025 (DAPO, arXiv:2503.14476): equal texts after dropping units, articles, spaces and LaTeX that changes only looks.
One addition of ours: "142.0" is 142, because benchmarks store integers so."""

from __future__ import annotations

import re
from typing import Any

from qurl.rewards.answers import accepted_answers, whole_number

TAIL_CHARACTERS = 300  # of a response, searched for its answer
ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)

REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"), (",\\text{and}", ","),
    ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
REMOVED = (
    *"square ways integers dollars mph inches hours km units \\ldots sue points feet minutes digits cents degrees".split(),
    *"cm gm pounds meters meals edges students childrentickets multiples".split(),
    *"\\text{s} \\text{.} \\text{}^2 \\text{}^3 \\text{}".split(),
    *"\\mathrm{th} ^\\circ ^{\\circ} \\; ,\\! {,} \" \\dots".split(),
)
"""In this order: what an earlier entry leaves may hold a later one."""


def dapo(response: str, ground_truth: str, **extra: Any) -> float:
    """1.0 where the last "Answer: ..." in the last 300 characters of the response equals the ground truth after normalization; else
    -1.0, also where there is none.

    A ground truth may be a worked solution or a list of alternatives, as for the reward "math"; ValueError for one that holds no
    answer."""
    truths = [normalize(truth) for truth in accepted_answers(ground_truth)]
    if not all(truths):
        raise ValueError(f"the ground truth {ground_truth[:80]!r} holds no answer")
    return 1.0 if vote(response) in truths else -1.0


def vote(response: str) -> str | None:
    """The normalized answer that is scored; None where there is none."""
    found = ANSWER.findall(response[-TAIL_CHARACTERS:])
    return normalize(found[-1]) or None if found else None


def normalize(answer: str) -> str:
    """The answer without what changes only its looks."""
    answer = answer.rpartition("=")[2]
    for old, new in REPLACED:
        answer = answer.replace(old, new)
    for expression in REMOVED:
        answer = answer.replace(expression, "")
    dollars = answer.split("$")
    answer = dollars[1] if len(dollars) > 2 else answer  # "is $7$ or so": what stands between the first two
    for wrapper in ("text", "textbf", "overline"):
        answer = re.sub(rf"\\{wrapper}\{{(.*?)\}}", r"\1", answer)
    answer = re.sub(r"\\boxed\{(.*)\}", r"\1", answer)
    answer = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", answer)
    answer = re.sub(r"sqrt([^{])", r"sqrt{\1}", answer).replace("$", "")
    if answer.replace(",", "").removeprefix("-").isdigit():
        answer = answer.replace(",", "")
    return whole_number(answer.strip())  # AIME's 033 as well as a data frame's 33.0
