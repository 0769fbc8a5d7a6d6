"""One text for answers of one value: what a majority counts together."""

from __future__ import annotations

import mpmath

from qurl.rewards.answers import normalize_latex, whole_number
from qurl.rewards.equality import MAX_ANSWER_CHARACTERS, shape_of
from qurl.rewards.mathematics.expressions import Node
from qurl.rewards.mathematics.shapes import Based, Items, Quantity, Relation, Shape, Word
from qurl.rewards.mathematics.values import exact_value, point_values

DIGITS = 12  # of the values of an expression that is no fraction


def ballot(answer: str | None) -> str | None:
    """Return the text under which an answer is counted: a fraction for a rational number, values for other expressions, and its
    own text where it cannot be read.

    Example:
        >>> ballot("0.5"), ballot("\\\\frac{3}{6}"), ballot("x=7"), ballot("\\\\sqrt{4}") == ballot("2")
        ('\\\\frac{1}{2}', '\\\\frac{1}{2}', '7', True)
    """
    if answer is None:
        return None
    text = whole_number(normalize_latex(answer)) or None
    if text is None or len(answer) > MAX_ANSWER_CHARACTERS:
        return text
    try:
        shape = shape_of(answer)
        return text if shape is None else _of_shape(shape) or text
    except (ArithmeticError, ValueError, TypeError, RecursionError):
        return text


def _of_shape(shape: Shape) -> str | None:
    if isinstance(shape, Word) or (len(shape.text) > 2 and shape.text.isalpha()):
        return (shape.word if isinstance(shape, Word) else shape.text).casefold()
    if isinstance(shape, Quantity):
        return _of_node(shape.nodes[0])
    if isinstance(shape, Based):
        return f"{shape.digits}_{shape.base}"
    if isinstance(shape, Relation) and set(shape.signs) == {"="} and isinstance(shape.sides[0], Quantity):
        return _of_shape(shape.sides[-1]) if shape.sides[0].nodes[0].kind == "symbol" else None
    if isinstance(shape, Items):
        parts = [_of_shape(item) for item in shape.items]
        texts = [part for part in parts if part is not None]
        if len(texts) < len(parts):
            return None
        is_ordered = shape.opener in ("(", "[")
        return f"{shape.opener}{','.join(texts)}{shape.closer}" if is_ordered else ",".join(sorted(texts))
    return None


def _of_node(node: Node) -> str:
    value = exact_value(node)
    if value is None:
        return " ".join(mpmath.nstr(mpmath.chop(value, 1e-20), DIGITS) for value in point_values(node))
    if value.denominator == 1:
        return str(value)
    return ("-" if value < 0 else "") + f"\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
