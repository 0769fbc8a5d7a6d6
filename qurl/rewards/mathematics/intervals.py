"""Sets of real numbers in one form: x >= 2, [2,oo), R without a point and unions of intervals are compared as what they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qurl.rewards.mathematics.expressions import Node
from qurl.rewards.mathematics.shapes import Items, Quantity, Relation, Sets, Shape
from qurl.rewards.mathematics.values import real_value, same_value


@dataclass(frozen=True, slots=True)
class Bound:
    """An end of an interval: its place, the expression it was written as, and whether it belongs to the interval."""

    place: float
    node: Node | None  # None for an infinite one
    is_closed: bool


Interval = tuple[Bound, Bound]
REALS: list[Interval] = [(Bound(-math.inf, None, False), Bound(math.inf, None, False))]


def same_set(first: list[Interval], second: list[Interval]) -> bool:
    """Whether two sets in the form of `intervals` hold the same numbers."""
    first, second = _joined(first), _joined(second)
    return len(first) == len(second) and all(
        _same_bound(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


def intervals(shape: Shape) -> tuple[str | None, list[Interval]] | None:
    """Return (the variable, where a relation names one; the set as intervals), None where the shape is no set of real numbers."""
    if isinstance(shape, Sets):
        left, right = intervals(shape.sides[0]), intervals(shape.sides[1])
        if left is None or right is None:
            return None
        if shape.sign == "\\cup":
            return left[0] or right[0], left[1] + right[1]
        return left[0] or right[0], _common(left[1], right[1] if shape.sign == "\\cap" else _without(right[1]))
    if isinstance(shape, Relation):
        return _of_relation(shape)
    if isinstance(shape, Items):
        return _of_items(shape)
    if shape.text.replace(" ", "") in ("\\mathbb{R}", "(-\\infty,\\infty)"):
        return None, REALS
    return (None, []) if shape.text == "\\emptyset" else None


def _of_items(shape: Items) -> tuple[str | None, list[Interval]] | None:
    if shape.opener in ("(", "[") and len(shape.items) == 2:
        ends = [_bound(item, bracket in "[]") for item, bracket in zip(shape.items, (shape.opener, shape.closer), strict=True)]
        if ends[0] is None or ends[1] is None or not ends[0].place < ends[1].place:
            return None
        return None, [(ends[0], ends[1])]
    if shape.opener == "\\{":
        points = [_bound(item, True) for item in shape.items]
        return (None, [(point, point) for point in points if point]) if points and all(points) else None
    if shape.opener or not all(isinstance(item, Relation | Sets | Items) for item in shape.items):
        return None
    parts = [intervals(item) for item in shape.items]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or len({name for name, _ in found if name}) > 1:
        return None
    common = found[0][1]
    for _, part in found[1:]:
        common = _common(common, part)
    either = [interval for _, part in found for interval in part]
    return found[0][0], either if shape.is_alternative or not common else common


def _of_relation(shape: Relation) -> tuple[str | None, list[Interval]] | None:
    """Read `x > 2`, `2 < x`, `1 < x < 2`, `x \\ne 3` and `x \\in [1,2]`, where x is one symbol."""
    if shape.signs == ("\\in",):
        inner = intervals(shape.sides[1])
        return None if inner is None or _name(shape.sides[0]) is None else (_name(shape.sides[0]), inner[1])
    names = [_name(side) for side in shape.sides]
    if len([name for name in names if name]) != 1 or "=" in shape.signs or "\\in" in shape.signs:
        return None
    at = next(index for index, name in enumerate(names) if name)
    result = REALS
    for index, side in enumerate(shape.sides):
        if index == at:
            continue
        sign = shape.signs[min(index, at)] if abs(index - at) == 1 else ""
        bound = _bound(side, sign in ("\\le", "\\ge"))
        if bound is None or not sign:
            return None
        if sign == "\\ne":
            result = _common(result, _without([(Bound(bound.place, bound.node, True),) * 2]))  # type: ignore[list-item]
        elif (sign in ("<", "\\le")) == (index > at):
            result = _common(result, [(REALS[0][0], bound)])
        else:
            result = _common(result, [(bound, REALS[0][1])])
    return names[at], result


def _name(shape: Shape) -> str | None:
    if isinstance(shape, Quantity) and shape.unit is None and shape.nodes[0].kind == "symbol":
        return str(shape.nodes[0].value)
    return None


def _bound(shape: Shape, is_closed: bool) -> Bound | None:
    if not isinstance(shape, Quantity):
        return None
    place = real_value(shape.nodes[0])
    if place is None or math.isinf(place):
        return None if place is None else Bound(place, None, False)
    return Bound(place, shape.nodes[0], is_closed)


def _same_bound(first: Bound, second: Bound) -> bool:
    if first.is_closed != second.is_closed or (first.node is None) != (second.node is None):
        return False
    return first.place == second.place if first.node is None or second.node is None else same_value(first.node, second.node)


def _meets(left: Bound, right: Bound) -> bool:
    """Whether an interval that ends at `left` and one that begins at `right` have no gap between them."""
    return left.place > right.place or (left.place == right.place and (left.is_closed or right.is_closed))


def _joined(parts: list[Interval]) -> list[Interval]:
    ordered = sorted(parts, key=lambda part: (part[0].place, not part[0].is_closed))
    joined: list[Interval] = []
    for begin, end in ordered:
        if joined and _meets(joined[-1][1], begin):
            last = joined[-1]
            joined[-1] = (last[0], max(last[1], end, key=lambda bound: (bound.place, bound.is_closed)))
        else:
            joined.append((begin, end))
    return joined


def _common(first: list[Interval], second: list[Interval]) -> list[Interval]:
    found = []
    for one in first:
        for other in second:
            begin = max(one[0], other[0], key=lambda bound: (bound.place, not bound.is_closed))
            end = min(one[1], other[1], key=lambda bound: (bound.place, bound.is_closed))
            if begin.place < end.place or (begin.place == end.place and begin.is_closed and end.is_closed):
                found.append((begin, end))
    return found


def _without(parts: list[Interval]) -> list[Interval]:
    """Return what the real numbers hold beside the set."""
    result = REALS
    for begin, end in _joined(parts):
        below, above = (Bound(bound.place, bound.node, not bound.is_closed) for bound in (begin, end))
        result = _common(result, [(REALS[0][0], below), (above, REALS[0][1])])
    return result
