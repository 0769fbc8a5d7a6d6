"""Grade-school word problems, whose answer is one number."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from qurl.rewards.answers import after_marker

NUMBER = re.compile(
    r"""(?: (?<![0-9A-Za-z)\]]) - )?                        # a sign, not a subtraction
        (?: [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9]) | [0-9]+ | (?=\.[0-9]) )
        (?: \.[0-9]+ )?                                     # a fraction, not a full stop""",
    re.VERBOSE,
)


def gsm8k(response: str, ground_truth: str, **extra: Any) -> float:
    """1.0 where the number of the response equals that of the ground truth; else 0.0.

    The number is the first one after the last "####", else the last one of the text; "$1,000.00" is 1000. The ground truth may be
    GSM8K's whole worked answer. ValueError where it holds no number."""
    truth = _number(ground_truth)
    if truth is None:
        raise ValueError(f"the ground truth {ground_truth[-80:]!r} holds no number")
    return float(_number(response) == truth)


def _number(text: str) -> Decimal | None:
    marked = after_marker(text)
    numbers = NUMBER.findall((text if marked is None else marked).replace("$", "").replace("\u2212", "-"))
    if not numbers:
        return None
    return Decimal(numbers[-1 if marked is None else 0].replace(",", ""))


def vote(response: str) -> str | None:
    """The number that is scored, written in one way; None where there is none."""
    number = _number(response)
    if number is None:
        return None
    text = f"{number:f}"
    return "0" if number == 0 else text.rstrip("0").rstrip(".") if "." in text else text
