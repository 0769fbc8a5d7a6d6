"""Grade-school word problems, whose answer is one number."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from qurl.rewards.answers import after_marker, after_thought, alternatives

DECIMAL = r"(?: [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9]) | [0-9]+ | (?=\.[0-9]) ) (?: \.[0-9]+ )?"  # a fraction, not a full stop
NUMBER = re.compile(
    rf"""(?P<sign> (?<![0-9A-Za-z)\]]) - )?                      # a sign, not a subtraction
         (?P<number> {DECIMAL} (?: [eE][-+]?[0-9]{{1,3}} (?![0-9A-Za-z]) )? )""",
    re.VERBOSE,
)
BEFORE = re.compile(r"(?:[0-9A-Za-z)}]\s?[*/^:\u00d7+]\s?-?|[\^_{])\Z")  # a number is part of an expression after this,
AFTER = re.compile(r"\s?[*/^:\u00d7+]\s?-?[0-9(\\a-zA-Z]|-[0-9]|[xyzn](?![a-zA-Z])|[\^_]")  # or in front of this
MAX_DIGITS = 1000
TAIL = 8 * MAX_DIGITS  # characters in which the last number is looked for first
FRACTION = re.compile(r"(-?[0-9]{1,30})\s?/\s?([0-9]{1,30})")
WRAPPED = re.compile(r"\\(?:boxed|fbox|text|mathrm|mathbf|textbf)\s?\{([^{}]*)\}|\*\*")
"""A box or a font around the number, bold in Markdown."""


def gsm8k(response: str, ground_truth: str, **extra: Any) -> float:
    """1.0 where the number of the response equals that of the ground truth; else 0.0.

    The number is the first one after the last "####", else the last one of the text after any thought; "$1,000.00" is 1000 and
    3/4 is 0.75. A number that is part of a larger expression (10^3, 12:30, 2+3) is none. The ground truth may be GSM8K's whole
    worked answer or a list of alternatives; one of several numbers is met by no response, so that the check before a run refuses
    its row. ValueError where it holds no number."""
    marked = after_marker(ground_truth)
    truths = alternatives(ground_truth if marked is None else marked)
    if not all(NUMBER.search(truth) for truth in truths):
        raise ValueError(f"the ground truth {ground_truth[-80:]!r} holds no number")
    number = _number(response)
    return float(number is not None and number in map(_whole, truths))


def _whole(truth: str) -> Fraction | None:
    """Return the one number of a ground truth: with a sign, a currency or a unit around it, but with no other number."""
    text = _plain(truth)
    if _fraction(text) is None and len(NUMBER.findall(text)) != 1:
        return None
    return _first(text)


def _number(response: str) -> Fraction | None:
    text = after_thought(response)
    marked = after_marker(text)
    if marked is not None:
        return _first(_plain(marked.rpartition("=")[2]))
    text = _plain(text)
    fraction = re.search(r"(?<![0-9.,/^*+:)-])-?[0-9]{1,30}\s?/\s?[0-9]{1,30}(?![0-9/^*+:(]|[.,][0-9])(?=[^0-9]*\Z)", text[-200:])
    if fraction:
        return _fraction(fraction[0])
    for part in (text[-TAIL:], text):  # a last number that the cut goes through is longer than any that counts
        if numbers := list(NUMBER.finditer(part)):
            return _value(numbers[-1])
    return None


def _plain(text: str) -> str:
    return WRAPPED.sub(r"\1", text.replace("\\$", "").replace("$", "").replace("\u2212", "-").replace("{,}", ","))


def _first(text: str) -> Fraction | None:
    fraction, number = _fraction(text), NUMBER.search(text)
    return _value(number) if fraction is None and number else fraction


def _fraction(text: str) -> Fraction | None:
    found = FRACTION.fullmatch(text.strip().rstrip("."))
    return Fraction(int(found[1]), int(found[2])) if found and int(found[2]) else None


def _value(found: re.Match[str]) -> Fraction | None:
    """Return the number that was found, None where it is part of an expression."""
    text, number = found.string, found["number"].replace(",", "")
    if len(number) > MAX_DIGITS or BEFORE.search(text[max(0, found.start() - 5) : found.start()]) or AFTER.match(text, found.end()):
        return None
    return Fraction((found["sign"] or "") + number)


def vote(response: str) -> str | None:
    """The number that is scored, written in one way; None where there is none."""
    number = _number(response)
    return None if number is None else written(number)


def written(number: Fraction) -> str:
    """Return an exact number in the one form that votes share: as a decimal where it ends, else as a fraction.

    Example:
        >>> written(Fraction(2641, 2)), written(Fraction(1, 3)), written(Fraction(7))
        ('1320.5', '1/3', '7')
    """
    rest, places = number.denominator, 0
    while rest % 10 in (0, 2, 4, 5, 6, 8):
        rest, places = rest // (2 if rest % 2 == 0 else 5), places + 1
    if rest != 1 or places == 0:
        return str(number)
    digits = str(abs(number.numerator) * 10**places // number.denominator).rjust(places + 1, "0")
    return ("-" if number < 0 else "") + f"{digits[:-places]}.{digits[-places:]}".rstrip("0")
