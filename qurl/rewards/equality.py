"""Equality of mathematical answers: `qurl.rewards.mathematics`, and math-verify (parsing LaTeX to SymPy) for what it does not know.

Effort is bounded. Our reader takes milliseconds; math-verify gets MAX_CPU_S, and is not asked where numbers could explode inside C
code, which no limit reaches. An answer that cannot be compared within that is wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from qurl.rewards.answers import normalize_latex
from qurl.rewards.limit import Budget, OutOfTime
from qurl.rewards.mathematics.compare import Unknown, same
from qurl.rewards.mathematics.expressions import Unreadable
from qurl.rewards.mathematics.latex import canonical
from qurl.rewards.mathematics.shapes import Items, Matrix, Opaque, Relation, Shape, nesting, read

MAX_ANSWER_CHARACTERS = 2000  # what is longer is compared as text only; the longest answer of MATH has about 160
MAX_CPU_S = 1.0  # that an answer may cost
EXPLOSIVE = re.compile(r"\d{6}|\^\s*\{[^{}]*\^|\^\s*\{?\s*\d{5}|\d{4}\s*!|!\s*!|\*\*[^*]*\*\*|binom.*\d{4}")
MAX_NESTING = 40


def equals_any(answer: str, truths: Sequence[str]) -> bool:
    """Whether `answer`, the content of a box, equals one of `truths` as text or as mathematics. An empty answer equals nothing."""
    text = normalize_latex(answer)
    if text and text in map(normalize_latex, truths):
        return True
    if not text or len(answer) > MAX_ANSWER_CHARACTERS:
        return False
    budget = Budget(MAX_CPU_S)
    try:
        return any(_equals(answer, truth, budget) for truth in truths if len(truth) <= MAX_ANSWER_CHARACTERS)
    except (OutOfTime, RecursionError, MemoryError):
        return False


def _equals(answer: str, truth: str, budget: Budget) -> bool:
    try:
        with budget.limit():
            wanted, given = canonical(truth), canonical(answer)
            if not given or wanted.replace(" ", "") == given.replace(" ", ""):
                return bool(given)
            return same(_shape(wanted, False), _shape(given, not re.search(r"\d\s+[a-zA-Z]", wanted)))
    except Unreadable:
        return False
    except Unknown:
        import math_verify  # noqa: F401  (outside of the limit: half an import would spoil every later one)

        with budget.limit():
            return _math_verify_equals(wanted, given)


@lru_cache(maxsize=256)
def _shape(text: str, letters: bool) -> Shape:
    if nesting(text) > MAX_NESTING:
        raise Unreadable("nested more deeply than an answer is")
    return read(text, letters)


def _math_verify_equals(truth: str, answer: str) -> bool:
    """Ask math-verify about sums, integrals and other notation that our reader does not know."""
    if EXPLOSIVE.search(truth) or EXPLOSIVE.search(answer):
        return False
    from math_verify import verify

    gold, found = _parse_box(truth), _parse_box(answer)
    if not gold or not found or any(isinstance(parsed[0], str) for parsed in (gold, found)):
        return False  # what neither reads is compared as text above
    return bool(verify(gold, found, timeout_seconds=None))


def _parse_box(answer: str) -> list[Any]:
    """What math-verify reads in a box with this content; case is kept, units are not dropped, and a number in what is no
    mathematics counts for nothing."""
    from latex2sympy2_extended import NormalizationConfig
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy, normalize_latex

    try:
        text = normalize_latex(answer, NormalizationConfig(malformed_operators=True, boxed="none"))
        config = ConversionConfig(lowercase_symbols=False)
        return [latex2sympy(text, is_real=True, normalization_config=None, conversion_config=config)]
    except Exception:  # trust boundary: the parser raises whatever it likes at text that a policy wrote
        return []


def shape_of(text: str) -> Shape | None:
    """Return the shape of an answer, None where it cannot be read or holds a part that our reader does not know."""
    try:
        shape = _shape(canonical(text), False)
    except (Unreadable, RecursionError):
        return None
    return None if _is_opaque(shape) else shape


def _is_opaque(shape: Shape) -> bool:
    parts: tuple[Shape, ...] = ()
    if isinstance(shape, Items):
        parts = shape.items
    elif isinstance(shape, Relation):
        parts = shape.sides
    elif isinstance(shape, Matrix):
        parts = tuple(entry for row in shape.rows for entry in row)
    return isinstance(shape, Opaque) or any(map(_is_opaque, parts))
