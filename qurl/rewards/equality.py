"""Equality of mathematical answers, by math-verify (parsing LaTeX to SymPy, then numeric and symbolic equality).

math-verify is generous where a policy could learn to profit from it, so three things must hold before its word counts: the base of
a number ("1011_2" is not "1011_3"; a missing base is as good as a missing unit), the order of a tuple or interval ("3,2" is not
"(2,3)"), and the size of a tiny number (it rounds to six decimals, so 2^{-98} would be 0).

Its own time limits are signals, which work in a main thread only and cannot interrupt C code. They are switched off here: a call
may take any time, and the reward pool kills it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from qurl.rewards.answers import normalize_latex

MAX_ANSWER_CHARACTERS = 2000  # what is longer is compared as text only; the longest answer of MATH has about 160
SMALL = 1e-3  # numbers below it are compared relatively, with this tolerance
SCIENTIFIC = re.compile(r"([-+]?[0-9]+(?:\.[0-9]+)?)[eE]([-+]?[0-9]{1,3})")  # 4.5e33, which math-verify takes for a product with e
BASED = re.compile(r"(-?[0-9A-Z]+)_\{?([0-9]+)\}?")  # digits and base


def equals_any(answer: str, truths: Sequence[str]) -> bool:
    """Whether `answer`, the content of a box, equals one of `truths` as text or as mathematics. An empty answer equals nothing."""
    text = normalize_latex(answer)
    if text and text in map(normalize_latex, truths):
        return True
    if not text or len(answer) > MAX_ANSWER_CHARACTERS:
        return False
    possible = [truth for truth in truths if _may_equal(text, normalize_latex(truth))]
    return bool(possible) and _equals_any(_parse_box(answer), possible)


def found_equals_any(text: str, truths: Sequence[str]) -> bool:
    """Whether the final answer that math-verify finds in `text` equals one of `truths` as mathematics."""
    from math_verify import parse

    return _equals_any(parse(text, parsing_timeout=None), truths)


def _equals_any(found: list[Any], truths: Sequence[str]) -> bool:
    """found: what math-verify parsed."""
    from math_verify import verify

    parsed = map(_parse_box, truths)
    return any(verify(truth, found, timeout_seconds=None) and _is_as_small(truth, found) for truth in parsed)


def _parse_box(answer: str) -> list[Any]:
    """What math-verify reads in a box with this content. LaTeX as a whole or only its text: by default math-verify goes on to look
    for any number in what it cannot read."""
    from math_verify import LatexExtractionConfig, parse

    number = SCIENTIFIC.fullmatch(answer.strip())
    content = rf"{number[1]} \times 10^{{{int(number[2])}}}" if number else answer
    return parse(f"\\boxed{{{content}}}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)


def _may_equal(answer: str, truth: str) -> bool:
    """Normalized texts; False where base or order differ, whatever they hold."""
    wanted, given = BASED.fullmatch(truth), BASED.fullmatch(answer)
    if wanted and given:
        return wanted.groups() == given.groups()
    is_ordered = truth[:1] in ("(", "[") and truth[-1:] in (")", "]") and "," in truth
    return not is_ordered or answer[-1:] in (")", "]")


def _is_as_small(truth: Sequence[Any], found: Sequence[Any]) -> bool:
    """What math-verify parsed; False for two numbers of which one is small and the other is not near it, relative to its size."""
    if not (truth and found and all(getattr(parsed[0], "is_number", False) for parsed in (truth, found))):
        return True
    try:
        first, second = complex(truth[0]), complex(found[0])
    except (TypeError, ValueError, OverflowError):  # no complex number: nan, zoo, beyond floating point
        return True
    size = max(abs(first), abs(second))
    return size >= SMALL or abs(first - second) <= SMALL * size
