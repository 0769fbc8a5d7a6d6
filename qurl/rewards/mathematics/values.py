"""Equality of two expressions: as exact fractions where both are, else by their numeric values at a few points.

Nothing here solves or simplifies. Each operation checks the size of what it would make first, so that no text costs more than
milliseconds: 9^{9^{9}} is `TooLarge`, and equal only to what is written alike."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

import mpmath

from qurl.rewards.mathematics.expressions import Node

MAX_BITS = 100_000  # of an exact number
MAX_EXPONENT = 10**7  # of two, of a numeric value
MAX_FACTORIAL = 5000
DIGITS = 30  # of numeric values, beyond the size of the largest number; then twice as many
NUM_POINTS = 6  # real points at which expressions with symbols are compared
MIN_POINTS = 2  # that must say so
POSITIVE_POINTS = 3  # the first of them


EXACT_CALLS: dict[str, Callable[[list[Fraction]], Any]] = {
    "abs": lambda values: abs(values[0]), "floor": lambda values: math.floor(values[0]),
    "ceil": lambda values: math.ceil(values[0]), "max": max, "min": min,
}  # fmt: skip


class TooLarge(ValueError):
    """The value needs more digits than an answer has."""


def same_value(first: Node, second: Node) -> bool:
    """Whether two expressions are equal: exactly where both are rational, else at every point at which both are real."""
    if first == second:
        return True
    try:
        exact = exact_value(first), exact_value(second)
        if exact[0] is not None and exact[1] is not None:
            return exact[0] == exact[1]
        return _same_at_points(first, second)
    except (TooLarge, ZeroDivisionError, OverflowError, RecursionError):
        return False


@lru_cache(maxsize=512)
def exact_value(node: Node) -> Fraction | None:
    """Return the rational value of an expression without symbols and roots, None for any other. TooLarge beyond MAX_BITS."""
    if node.kind == "number":
        assert isinstance(node.value, Fraction)
        return node.value
    if node.kind in ("symbol", "constant"):
        return None
    parts = [exact_value(part) for part in node.args]
    values = [part for part in parts if part is not None]
    if len(values) < len(parts):
        return None
    result = _exact(node, values)
    if result is not None and result.numerator.bit_length() + result.denominator.bit_length() > MAX_BITS:
        raise TooLarge("a number of too many digits")
    return result


def _exact(node: Node, values: list[Fraction]) -> Fraction | None:
    if node.kind == "add":
        return sum(values, Fraction(0))
    if node.kind == "neg":
        return -values[0]
    if node.kind == "mul":
        return values[0] * values[1]
    if node.kind == "div":
        return values[0] / values[1]
    if node.kind == "pow":
        return _exact_power(values[0], values[1])
    if node.kind == "call" and all(value.denominator == 1 for value in values):
        integers = [int(value) for value in values]
        if node.value == "factorial" and 0 <= integers[0] <= MAX_FACTORIAL:
            return Fraction(math.factorial(integers[0]))
        if node.value == "binom" and 0 <= integers[1] <= integers[0] <= MAX_FACTORIAL:
            return Fraction(math.comb(*integers))
        if node.value == "gcd":
            return Fraction(math.gcd(*integers))
        if node.value == "lcm":
            return Fraction(math.lcm(*integers))
    if node.kind == "call" and str(node.value) in EXACT_CALLS:
        return Fraction(EXACT_CALLS[str(node.value)](values))
    return None


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return None
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits > 1 and abs(exponent) * bits > 2 * MAX_BITS:
        raise TooLarge("a power of too many digits")
    return Fraction(base**exponent) if bits > 1 or abs(exponent) < 2**62 else base ** (int(exponent) % 2)


def _same_at_points(first: Node, second: Node) -> bool:
    names = sorted(_symbols(first) | _symbols(second))
    digits = DIGITS + min(max(_size(first), _size(second)), 4000)
    is_complex = "i" in names
    names = [name for name in names if name not in ("e", "i")]
    if not names:
        verdict = _same_at(first, second, {}, digits, is_complex=True)
        return bool(verdict)
    for points in (_real_points(names), _integer_points(names)):
        verdicts = []
        for point in points:
            verdict = _same_at(first, second, point, digits, is_complex)
            if verdict is False:
                return False
            verdicts.append(verdict)
        if verdicts.count(True) >= MIN_POINTS:
            return True
    return False


def _real_points(names: list[str]) -> Iterator[dict[str, str]]:
    """Yield values between 0.2 and 3.2, in the later points with either sign; the same name always has the same ones."""
    for index in range(NUM_POINTS):
        point = {}
        for name in names:
            seed = int.from_bytes(hashlib.blake2b(f"{index} {name}".encode(), digest_size=6).digest(), "big")
            sign = "-" if index >= POSITIVE_POINTS and seed % 2 else ""
            point[name] = f"{sign}{0.2 + 3 * (seed / 2**48):.12f}"
        yield point


def _integer_points(names: list[str]) -> Iterator[dict[str, str]]:
    for index in range(1, 4):
        yield {name: str(2 * index + position) for position, name in enumerate(names)}


def _same_at(first: Node, second: Node, point: Mapping[str, str], digits: int, is_complex: bool) -> bool | None:
    """Whether both have one value at a point; None where either has no finite, or no real one.

    Values are taken twice, the second time with twice the digits: what is 0 but for rounding shrinks in between."""
    rough = _both(first, second, point, digits, is_complex)
    if rough is None:
        return None
    if _infinite(rough[0]) or _infinite(rough[1]):
        return bool(rough[0] == rough[1])
    if abs(rough[0] - rough[1]) > mpmath.mpf(10) ** -10 * max(abs(rough[0]), abs(rough[1])) and _is_large(rough, digits):
        return False
    fine = _both(first, second, point, 2 * digits, is_complex)
    if fine is None:
        return None
    with mpmath.workdps(2 * digits):
        zeros = [abs(b) <= abs(a) * mpmath.mpf(10) ** (-digits // 2) for a, b in zip(rough, fine, strict=True)]
        if any(zeros):
            return all(zeros)
        return bool(abs(fine[0] - fine[1]) <= mpmath.mpf(10) ** -int(1.5 * digits) * max(abs(fine[0]), abs(fine[1])))


def _infinite(value: Any) -> bool:
    return bool(mpmath.isinf(value))


def _is_large(values: tuple[Any, Any], digits: int) -> bool:
    """Whether neither value can be 0 but for rounding."""
    return bool(max(map(abs, values)) > mpmath.mpf(10) ** (-digits // 2))


def _both(first: Node, second: Node, point: Mapping[str, str], digits: int, is_complex: bool) -> tuple[Any, Any] | None:
    with mpmath.workdps(digits):
        try:
            values = numeric_value(first, point), numeric_value(second, point)
        except (ZeroDivisionError, ValueError, OverflowError, TypeError) as error:
            if isinstance(error, TooLarge):
                raise
            return None
        if any(mpmath.isnan(value) for value in values):
            return None
        small = mpmath.mpf(10) ** (-digits // 2)
        if not is_complex and any(abs(mpmath.im(value)) > small * (1 + abs(value)) for value in values if not _infinite(value)):
            return None
        return values


def constant_value(node: Node) -> float | None:
    """Return the real value that an expression with symbols has at every point where it has one; None where values differ, are
    too few, or there is no symbol."""
    names = sorted(_symbols(node) - {"e", "i"})
    if not names:
        return None
    values = []
    for point in _real_points(names):
        try:
            value = numeric_value(node, point)
        except (ArithmeticError, ValueError, TypeError):
            continue
        if not (mpmath.isnan(value) or _infinite(value)) and abs(mpmath.im(value)) < 1e-9:
            values.append(float(mpmath.re(value)))
    is_constant = len(values) >= MIN_POINTS and max(values) - min(values) <= 1e-9 * max(map(abs, values))
    return values[0] if is_constant else None


def point_values(node: Node) -> list[Any]:
    """Return the values of an expression at the positive points, to DIGITS digits; one value where it has no symbol."""
    names = sorted(_symbols(node) - {"e", "i"})
    points = list(_real_points(names))[: POSITIVE_POINTS if names else 1]
    with mpmath.workdps(DIGITS):
        return [numeric_value(node, point) for point in points]


def real_value(node: Node) -> float | None:
    """Return the value of an expression without symbols, infinities included; None where it has none or is not real."""
    if _symbols(node) - {"e"}:
        return None
    try:
        value = numeric_value(node, {})
    except (ArithmeticError, ValueError, TypeError):
        return None
    return float(mpmath.re(value)) if abs(mpmath.im(value)) < 1e-9 and not mpmath.isnan(value) else None


def _symbols(node: Node) -> frozenset[str]:
    if node.kind == "symbol":
        return frozenset({str(node.value)})
    return frozenset().union(*map(_symbols, node.args))


def _size(node: Node) -> int:
    """The number of decimal digits of the largest number that the exact parts of an expression reach."""
    try:
        value = exact_value(node)
    except TooLarge:
        return 0
    if value is not None:
        return int(max(value.numerator.bit_length(), value.denominator.bit_length()) * 0.302) if value else 0
    return max(map(_size, node.args), default=0)


def numeric_value(node: Node, point: Mapping[str, str]) -> Any:
    """Return the mpmath value of an expression at the working precision. TooLarge or ValueError where there is none."""
    if node.kind == "number":
        assert isinstance(node.value, Fraction)
        if node.value.numerator.bit_length() > MAX_BITS:
            raise TooLarge("a number of too many digits")
        return mpmath.mpf(node.value.numerator) / node.value.denominator
    if node.kind == "constant":
        return mpmath.inf if node.value == "infty" else +mpmath.pi
    if node.kind == "symbol":
        name = str(node.value)
        return mpmath.e if name == "e" else mpmath.mpc(0, 1) if name == "i" else mpmath.mpf(point[name])
    if node.kind == "pow":
        return _power(numeric_value(node.args[0], point), numeric_value(node.args[1], point))
    values = [numeric_value(part, point) for part in node.args]
    if node.kind == "add":
        return sum(values, mpmath.mpf(0))
    if node.kind == "neg":
        return -values[0]
    if node.kind == "mul":
        return values[0] * values[1]
    if node.kind == "div":
        return values[0] / values[1]
    return _call(str(node.value), values)


def _power(base: Any, exponent: Any) -> Any:
    if _infinite(base) or _infinite(exponent):
        return base**exponent
    if base == 0:
        if mpmath.re(exponent) < 0:
            raise ZeroDivisionError
        return mpmath.mpf(0) if exponent != 0 else mpmath.mpf(1)
    if abs(exponent) * abs(mpmath.log(abs(base), 2)) > MAX_EXPONENT or abs(exponent) > MAX_EXPONENT:
        raise TooLarge("a power of too many digits")
    return mpmath.power(base, exponent)


CALLS: dict[str, Callable[..., Any]] = {
    "sin": mpmath.sin, "cos": mpmath.cos, "tan": mpmath.tan, "cot": mpmath.cot, "sec": mpmath.sec, "csc": mpmath.csc,
    "arcsin": mpmath.asin, "arccos": mpmath.acos, "arctan": mpmath.atan, "arccot": mpmath.acot, "arcsec": mpmath.asec,
    "arccsc": mpmath.acsc, "sinh": mpmath.sinh, "cosh": mpmath.cosh, "tanh": mpmath.tanh, "coth": mpmath.coth,
    "ln": mpmath.log, "log": mpmath.log10, "log_base": mpmath.log, "ln_base": mpmath.log, "abs": abs,
    "exp": lambda x: _power(mpmath.e, x), "floor": mpmath.floor, "ceil": mpmath.ceil, "max": max, "min": min,
    "binom": mpmath.binomial,
}  # fmt: skip


def _call(name: str, values: list[Any]) -> Any:
    if name.startswith("?"):  # an unknown function: any value that depends on its name and arguments
        text = name + " ".join(mpmath.nstr(value, 12) for value in values)
        return mpmath.mpf(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")) / 2**47
    if name == "root":
        radicand, degree = values
        is_odd = degree == mpmath.floor(degree) and int(degree) % 2 == 1
        if is_odd and mpmath.im(radicand) == 0 and mpmath.re(radicand) < 0:  # the real root
            return -_power(-radicand, 1 / degree)
        return mpmath.sqrt(radicand) if degree == 2 else _power(radicand, 1 / degree)
    if name in ("factorial", "double_factorial", "binom") and max(map(abs, values)) > MAX_FACTORIAL:
        raise TooLarge("a factorial of too many digits")
    if name == "factorial":
        return mpmath.factorial(values[0])
    if name == "double_factorial":
        return mpmath.fac2(values[0])
    if name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth") and abs(values[0]) > MAX_EXPONENT:
        raise TooLarge("a function of too large a number")
    if name not in CALLS:
        raise ValueError(f"no function {name}")
    return CALLS[name](*values)
