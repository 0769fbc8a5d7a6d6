"""Whether an answer means what the truth means, part by part.

Order counts in parentheses and not in braces; `x = 5` answers a question for 5; a missing unit, base or name is as good as none,
another one is wrong."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from qurl.rewards.mathematics.expressions import Node
from qurl.rewards.mathematics.intervals import intervals, same_set
from qurl.rewards.mathematics.shapes import Based, Items, Matrix, Opaque, Quantity, Relation, Shape, Word
from qurl.rewards.mathematics.units import factor_between
from qurl.rewards.mathematics.values import TooLarge, constant_value, exact_value, numeric_value, real_value, same_value

ROUNDED_DIGITS = 6  # that a decimal must have, and behind the point as well, to stand for a number that no decimal is


class Unknown(ValueError):
    """The two hold something that this reader does not know."""


def same(truth: Shape, answer: Shape) -> bool:
    """Whether `answer` is right where `truth` is. Unknown where it cannot be said."""
    if truth.text.replace(" ", "") == answer.text.replace(" ", ""):
        return True
    if isinstance(truth, Word) or isinstance(answer, Word):
        return _same_words(truth, answer)
    if isinstance(truth, Relation) or isinstance(answer, Relation):
        return _same_relations(truth, answer)
    if isinstance(truth, Opaque) or isinstance(answer, Opaque):
        if isinstance(truth, Opaque):
            raise Unknown(truth.text)
        raise Unknown(answer.text)
    if isinstance(truth, Quantity) and isinstance(answer, Quantity):
        return _same_quantities(truth, answer) or _same_words(truth, answer)
    if isinstance(truth, Based) or isinstance(answer, Based):
        return _same_based(truth, answer)
    if isinstance(truth, Matrix) and isinstance(answer, Matrix):
        return [len(row) for row in truth.rows] == [len(row) for row in answer.rows] and all(
            same(one, other) for rows in zip(truth.rows, answer.rows, strict=True) for one, other in zip(*rows, strict=True)
        )
    if isinstance(truth, Items) and isinstance(answer, Items):
        return _same_items(truth, answer)
    if isinstance(truth, Items) and not truth.opener == "(" and len(truth.items) == 1 and isinstance(answer, Quantity):
        return same(truth.items[0], answer)
    if isinstance(answer, Items) and answer.opener == "\\{" and len(answer.items) == 1 and isinstance(truth, Quantity):
        return same(truth, answer.items[0])
    return _same_sets(truth, answer)


def _same_sets(truth: Shape, answer: Shape) -> bool:
    first, second = intervals(truth), intervals(answer)
    if first is None or second is None or (first[0] and second[0] and first[0] != second[0]):
        return False
    return same_set(first[1], second[1])


def _same_words(truth: Shape, answer: Shape) -> bool:
    """Case counts outside text: one in \\text, or a capital at the begin of a whole word, is the same word."""
    first, second = (_words(shape) for shape in (truth, answer))
    if first is None or second is None:
        return False
    is_text = any(isinstance(shape, Word) and shape.is_text for shape in (truth, answer))
    if first == second:
        return True
    if first.casefold() != second.casefold() or not first:
        return False
    return (is_text and len(first) > 1) or (len(first) > 2 and first[1:] == second[1:] and first[1:].islower())


def _words(shape: Shape) -> str | None:
    if isinstance(shape, Relation):
        return _words(shape.sides[-1])
    text = shape.word if isinstance(shape, Word) else shape.text
    if not isinstance(shape, Word) and not re.fullmatch(r"\(?\s*[a-zA-Z]+\s*\)?", text):
        return None
    return " ".join(text.strip().strip("().,").split()).strip()


def _same_based(truth: Shape, answer: Shape) -> bool:
    """1011_2 is 1011 with its base left out, and no other base is right."""
    if isinstance(truth, Based) and isinstance(answer, Based):
        return (truth.digits, truth.base) == (answer.digits, answer.base)
    based, other = (truth, answer) if isinstance(truth, Based) else (answer, truth)
    assert isinstance(based, Based)
    return re.sub(r"[\s(){}]|\\text", "", other.text) == based.digits


def _same_quantities(truth: Quantity, answer: Quantity) -> bool:
    factor = factor_between(truth.unit, answer.unit)
    if factor is None:
        return False
    pairs = [(one, other) for one in truth.nodes for other in answer.nodes]
    if factor != 1:
        scale = Node("number", value=factor)
        return any(same_value(one, Node("mul", (scale, other))) for one, other in pairs)
    if any(same_value(one, other) or _rounds(truth, one, answer, other) for one, other in pairs):
        return True
    if truth.is_percent != answer.is_percent:  # 80% is 0.8, and 80 with its sign left out
        hundred = Node("number", value=Fraction(100))
        return any(
            same_value(*((Node("mul", (hundred, one)), other) if truth.is_percent else (one, Node("mul", (hundred, other)))))
            for one, other in pairs
        )
    return False


def _rounds(truth: Quantity, one: Node, answer: Quantity, other: Node) -> bool:
    """Whether one side is a decimal of enough digits that rounds the other, and the other is a number no decimal equals."""
    for decimal, written, exact in ((answer.digits, other, one), (truth.digits, one, other)):
        if decimal is None or min(decimal) < ROUNDED_DIGITS:
            continue
        try:
            value, limit = exact_value(exact), exact_value(written)
            if limit is None or (value is not None and _ends(value)):
                continue
            gap = abs(limit - value) if value is not None else abs(numeric_value(written, {}) - numeric_value(exact, {}))
            return bool(gap * 10 ** decimal[1] * 2 <= 1)
        except (TooLarge, ArithmeticError, KeyError, TypeError, ValueError):
            continue
    return False


def _ends(value: Fraction) -> bool:
    """Whether a decimal of finite length equals the number."""
    rest = value.denominator
    while rest % 2 == 0 or rest % 5 == 0:
        rest //= math.gcd(rest, 10)
    return rest == 1


def _same_items(truth: Items, answer: Items) -> bool:
    if truth.opener in ("(", "["):
        named = _by_name(answer) if truth.opener == "(" else None
        if named is not None:
            return _all_same(truth.items, named)
        if answer.opener in ("(", "["):
            return (truth.opener, truth.closer) == (answer.opener, answer.closer) and _all_same(truth.items, answer.items)
        return _same_sets(truth, answer)
    if answer.opener in ("(", "["):
        if truth.opener == "\\{":
            return False
        named = _by_name(truth)
        if (answer.opener, answer.closer) == ("(", ")") and _all_same(named or truth.items, answer.items):
            return True
        return len(truth.items) == 1 and same(truth.items[0], answer) or _same_sets(truth, answer)
    if truth.opener == "\\{" and answer.opener == "\\{" or len(truth.items) == len(answer.items):
        return _same_in_any_order(truth, answer)
    if len(answer.items) == 1 and isinstance(answer.items[0], Items):  # braces around what is a list anyway
        return same(truth, answer.items[0])
    if len(truth.items) == 1 and isinstance(truth.items[0], Items):
        return same(truth.items[0], answer)
    return _same_sets(truth, answer)


def _all_same(truths: tuple[Shape, ...], answers: tuple[Shape, ...]) -> bool:
    return len(truths) == len(answers) and all(same(one, other) for one, other in zip(truths, answers, strict=True))


def _same_in_any_order(truth: Items, answer: Items) -> bool:
    left = list(answer.items)
    if len(left) != len(truth.items):
        return False
    for item in truth.items:
        found = next((index for index, other in enumerate(left) if same(item, other)), None)
        if found is None:
            return _same_sets(truth, answer)
        del left[found]
    return True


def _by_name(shape: Items) -> tuple[Shape, ...] | None:
    """Return the values of `x=1, y=2` in the order of their names where these are letters, else as written; else None."""
    if shape.opener not in ("", "\\{"):
        return None
    named = []
    for item in shape.items:
        if not (isinstance(item, Relation) and item.signs == ("=",) and _is_name(item.sides[0])):
            return None
        named.append((item.sides[0].text, item.sides[1]))
    names = [name for name, _ in named]
    if len(set(names)) < len(names) or len(names) < 2:
        return None
    return tuple(value for _, value in (sorted(named, key=lambda pair: pair[0]) if all(map(str.isalpha, names)) else named))


def _is_name(shape: Shape) -> bool:
    """Whether a side of an equation only names what the other side is: x, f(x), (x,y), \\angle ABC, \\text{area}."""
    if isinstance(shape, Items):
        return all(_is_name(item) for item in shape.items)
    if isinstance(shape, Word):
        return True
    if not isinstance(shape, Quantity):
        return False
    node = shape.nodes[0]
    return node.kind == "symbol" or (node.kind == "call" and str(node.value).startswith("?")) or _is_product_of_letters(node)


def _is_product_of_letters(node: Node) -> bool:
    return node.kind == "symbol" or (node.kind == "mul" and all(map(_is_product_of_letters, node.args)))


def _same_relations(truth: Shape, answer: Shape) -> bool:
    if isinstance(truth, Relation) and isinstance(answer, Relation):
        return _same_two_relations(truth, answer)
    if isinstance(answer, Relation):
        if answer.signs[-1] == "=" and "\\ne" not in answer.signs:
            return set(answer.signs) == {"="} and (same(truth, answer.sides[-1]) or _is_rounded_behind(truth, answer))
        if answer.signs == ("\\in",) and _is_name(answer.sides[0]):
            return same(truth, answer.sides[1])
        return _same_sets(truth, answer)
    assert isinstance(truth, Relation)
    if set(truth.signs) == {"="} and _is_name(truth.sides[0]):
        return same(truth.sides[-1], answer)
    if truth.signs == ("\\in",) and _is_name(truth.sides[0]):
        return same(truth.sides[1], answer)
    if isinstance(answer, Opaque):
        raise Unknown(answer.text)
    return _same_sets(truth, answer)


def _is_rounded_behind(truth: Shape, answer: Relation) -> bool:
    """Whether an answer such as `\\frac{2}{3} \\approx 0.67` gives the exact value first and then a decimal near it."""
    exact, rounded = answer.sides[-2:]
    if not (isinstance(exact, Quantity) and isinstance(rounded, Quantity) and rounded.digits and not _is_name(exact)):
        return False
    value, near = real_value(exact.nodes[0]), real_value(rounded.nodes[0])
    return value is not None and near is not None and math.isclose(value, near, rel_tol=0.01) and same(truth, exact)


def _same_two_relations(truth: Relation, answer: Relation) -> bool:
    if set(truth.signs) == set(answer.signs) == {"="}:
        (first, value), (second, other) = ((shape.sides[0], shape.sides[-1]) for shape in (truth, answer))
        if same(first, second) and same(value, other):
            return True
        return len(truth.signs) == len(answer.signs) == 1 and _proportional(truth, answer)
    if len(truth.signs) == len(answer.signs) == 1:
        if truth.signs == answer.signs == ("\\in",):
            return _all_same(truth.sides, answer.sides)
        flipped = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
        if truth.signs == answer.signs and _all_same(truth.sides, answer.sides):
            return True
        if flipped.get(truth.signs[0]) == answer.signs[0] and _all_same(truth.sides, answer.sides[::-1]):
            return True
        if truth.signs[0] in flipped and answer.signs[0] in flipped and _proportional(truth, answer, is_inequality=True):
            return True
    elif truth.signs == answer.signs and _all_same(truth.sides, answer.sides):
        return True
    return _same_sets(truth, answer)


def _proportional(truth: Relation, answer: Relation, is_inequality: bool = False) -> bool:
    """Whether left minus right of one relation is a number times that of the other, a positive one where a sign has a direction."""
    sides = [side for shape in (truth, answer) for side in shape.sides]
    if not all(isinstance(side, Quantity) for side in sides):
        return False
    nodes = [side.nodes[0] for side in sides if isinstance(side, Quantity)]
    one, other = (Node("add", (left, Node("neg", (right,)))) for left, right in (nodes[:2], nodes[2:]))
    if is_inequality:
        if ("\\" in truth.signs[0]) != ("\\" in answer.signs[0]):  # < and \\le
            return False
        if (truth.signs[0] in ("<", "\\le")) != (answer.signs[0] in ("<", "\\le")):
            other = Node("neg", (other,))
    ratio = constant_value(Node("div", (one, other)))
    return ratio is not None and ratio != 0 and (ratio > 0 or not is_inequality)
