"""Random expressions, written in other ways, are the same answer; with one thing changed they are another one.

Trees, their LaTeX and their values are made here, independent of the reader under test: a change counts as one where plain floating
point arithmetic says so."""

from __future__ import annotations

import cmath
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qurl.rewards import REWARDS, VOTES

NUMBERS = st.integers(1, 12).map(lambda value: ("number", value))
SYMBOLS = st.sampled_from(["x", "y", "M", "m", "t", "\\theta", "v_{0}"]).map(lambda name: ("symbol", name))
TREES = st.recursive(
    NUMBERS | SYMBOLS,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "mul", "div"]), inner, inner),
        st.tuples(st.just("pow"), inner, st.integers(2, 3).map(lambda value: ("number", value))),
        st.tuples(st.sampled_from(["sin", "cos", "exp", "sqrt"]), inner),
    ),
    max_leaves=6,
)
POINTS = [{"x": 0.7, "y": 1.3, "M": 2.1, "m": 0.4, "t": 1.9, "\\theta": 0.9, "v_{0}": 1.1, "q": 0.61},
          {"x": 2.2, "y": 0.3, "M": 0.8, "m": 1.7, "t": 0.5, "\\theta": 1.2, "v_{0}": 2.7, "q": 1.83}]  # fmt: skip
FIXED = settings(max_examples=60, deadline=None, derandomize=True)


def value(tree, point):
    kind, *parts = tree
    if kind in ("number", "symbol"):
        return complex(point[parts[0]] if kind == "symbol" else parts[0])
    values = [value(part, point) for part in parts]
    binary = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
              "pow": lambda a, b: a**b}  # fmt: skip
    return binary[kind](*values) if kind in binary else getattr(cmath, kind)(*values)


def values(tree):
    try:
        found = [value(tree, point) for point in POINTS]
    except (ZeroDivisionError, OverflowError):
        found = []
    assume(found and all(abs(number.imag) < 1e-12 and 1e-6 < abs(number) < 1e9 for number in found))
    return found


def latex(tree, style):
    """One of the ways to write a tree. style: a random.Random that chooses."""
    kind, *parts = tree
    if kind == "number":
        spellings = [str(parts[0])] * 3 + [f"{parts[0]}.0", f"\\frac{{{2 * parts[0]}}}{{2}}"]
        return style.choice(spellings) if style else str(parts[0])
    if kind == "symbol":
        return parts[0]
    if style and kind in ("add", "mul") and style.random() < 0.5:
        parts = parts[::-1]
    inner = [latex(part, style) for part in parts]
    left, right = (style.choice([("(", ")"), ("\\left(", "\\right)"), ("( ", " )")]) if style else ("(", ")"))
    groups = [f"{left}{text}{right}" for text in inner]
    if kind in ("add", "sub"):
        sign = "+" if kind == "add" else "-"
        return f"{inner[0]} {sign} {groups[1]}"
    if kind == "mul":
        return (style.choice([" \\cdot ", "", " \\times ", "*"]) if style else " \\cdot ").join(groups)
    if kind == "div":
        forms = [f"\\frac{{{inner[0]}}}{{{inner[1]}}}", f"\\dfrac{{{inner[0]}}}{{{inner[1]}}}", f"{groups[0]}/{groups[1]}"]
        return style.choice(forms) if style else forms[0]
    if kind == "pow":
        return f"{groups[0]}^{{{parts[1][1]}}}"
    forms = {"sqrt": [f"\\sqrt{{{inner[0]}}}", f"sqrt({inner[0]})", f"({inner[0]})^{{1/2}}"],
             "exp": [f"e^{{{inner[0]}}}", f"\\exp\\left({inner[0]}\\right)", f"exp({inner[0]})"]}.get(
                 kind, [f"\\{kind}{groups[0]}", f"\\{kind}{{({inner[0]})}}", f"{kind}({inner[0]})"])  # fmt: skip
    return style.choice(forms) if style else forms[0]


def leaves(tree, path=()):
    if tree[0] in ("number", "symbol"):
        return [path]
    return [found for index, part in enumerate(tree[1:], 1) for found in leaves(part, (*path, index))]


def changed(tree, path, style):
    """The tree with another leaf at `path`: the next number, the letter in its other case, or another letter."""
    if not path:
        kind, content = tree
        if kind == "number":
            return kind, content + style.choice([1, 10])
        return kind, style.choice([{"M": "m", "m": "M"}.get(content, "q"), "q"])
    index, *rest = path
    return (*tree[:index], changed(tree[index], rest, style), *tree[index + 1 :])


def wrapped(text, style):
    """The answer as a response gives it."""
    forms = [f"\\boxed{{{text}}}", f"\\boxed{{ {text} }}.", f"so $\\boxed{{z = {text}}}$", f"\\boxed{{$\\displaystyle {text}$}}"]
    return style.choice(forms)


@FIXED
@given(TREES, st.integers(0, 10**6))
def test_an_expression_written_in_another_way_is_right(tree, seed):
    values(tree)
    style = random.Random(seed)
    assert REWARDS["math"](wrapped(latex(tree, style), style), latex(tree, None)) == 1.0


@FIXED
@given(TREES, st.integers(0, 10**6))
def test_an_expression_with_one_leaf_changed_is_wrong(tree, seed):
    style = random.Random(seed)
    other = changed(tree, style.choice(leaves(tree)), style)
    differs = any(abs(a - b) > 1e-6 * max(abs(a), abs(b)) for a, b in zip(values(tree), values(other), strict=True))
    assume(differs)
    assert REWARDS["math"](wrapped(latex(other, style), style), latex(tree, None)) == 0.0


PARTS = st.lists(st.fractions(-20, 20, max_denominator=12), min_size=2, max_size=4, unique=True)
BRACKETS = ["()", "[]", "(]", "[)"]


def spelled(number, style):
    sign, top, bottom = "-" * (number < 0), abs(number.numerator), number.denominator
    if bottom == 1:
        return f"{sign}{top}"
    forms = [f"{sign}\\frac{{{top}}}{{{bottom}}}", f"{sign}{top}/{bottom}", f"\\frac{{{sign}{3 * top}}}{{{3 * bottom}}}"]
    forms += [f"{sign}{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}"] if top > bottom else []
    forms += [f"{sign}{top / bottom!r}"] if bottom in (2, 4, 5, 8, 10) else []
    return style.choice(forms)


@FIXED
@given(PARTS, st.integers(0, 10**6))
def test_lists_sets_and_tuples_keep_what_counts_and_nothing_else(parts, seed):
    style, math = random.Random(seed), REWARDS["math"]
    one = [spelled(part, style) for part in parts]
    same = [spelled(part, style) for part in parts]
    mixed = style.sample(same, len(same))
    assert math(f"\\boxed{{{', '.join(mixed)}}}", ", ".join(one)) == 1.0
    assert math(f"\\boxed{{\\{{{','.join(mixed)}\\}}}}", ", ".join(one)) == 1.0
    assert math(f"\\boxed{{({', '.join(same)})}}", f"({','.join(one)})") == 1.0
    assert math(f"\\boxed{{({', '.join(same[::-1])})}}", f"({','.join(one)})") == 0.0
    for short in (same[:-1], [*same, "77"], [*same[:-1], "77"]):
        assert math(f"\\boxed{{{', '.join(short)}}}", ", ".join(one)) == 0.0
        assert math(f"\\boxed{{({', '.join(short)})}}", f"({','.join(one)})") == 0.0


@FIXED
@given(PARTS, st.sampled_from(BRACKETS), st.sampled_from(BRACKETS), st.integers(0, 10**6))
def test_intervals_are_what_they_hold(parts, brackets, others, seed):
    style, math = random.Random(seed), REWARDS["math"]
    low, high = sorted(parts)[:2]
    (a, b), (c, d) = ((spelled(low, style), spelled(high, style)) for _ in range(2))
    truth = f"{brackets[0]}{a}, {b}{brackets[1]}"
    assert math(f"\\boxed{{\\left{others[0]}{c},{d}\\right{others[1]}}}", truth) == float(brackets == others)
    signs = ["<" if bracket in "()" else style.choice(["\\le", "\\leq", "\u2264"]) for bracket in others]
    for response in (f"{c} {signs[0]} x {signs[1]} {d}", f"x \\in {others[0]}{c},{d}{others[1]}"):
        assert math(f"\\boxed{{{response}}}", truth) == float(brackets == others)
    assert math(f"\\boxed{{{brackets[0]}{c},{spelled(high + 1, style)}{brackets[1]}}}", truth) == 0.0


@FIXED
@given(PARTS, st.integers(0, 10**6))
def test_equal_numbers_are_one_ballot_and_others_another(parts, seed):
    style = random.Random(seed)
    ballots = {VOTES["math"](f"\\boxed{{{spelled(part, style)}}}") for part in parts for _ in range(3)}
    assert len(ballots) == len(parts)


@pytest.mark.parametrize(
    ("answers", "vote"),
    [
        (["1/2", "0.5", "\\dfrac{1}{2}", "\u00bd", "x = 0.5"], "\\frac{1}{2}"),
        (["(1,2)", "( 1, \\frac{4}{2} )"], "(1,2)"),
        (["\\text{East}", "east"], "east"),
        (["9^{9^{9}}"], "9^{9^{9}}"),
    ],
)
def test_answers_of_one_value_are_one_ballot(answers, vote):
    assert {VOTES["math"](f"\\boxed{{{answer}}}") for answer in answers} == {vote}
    assert {VOTES["deepscaler"](f"</think>\\boxed{{{answer}}}") for answer in answers} == {vote}
