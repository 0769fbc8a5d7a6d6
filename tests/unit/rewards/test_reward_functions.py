"""What each verifier calls right and wrong."""

from __future__ import annotations

import time

import pytest

from qurl.rewards import REWARDS
from qurl.rewards.answers import last_boxed

RIGHT_AND_WRONG = {
    "gsm8k": [
        ("so #### 132", "132", 1.0),
        ("so #### 132", "100+32\n#### 132", 1.0),
        ("It makes $1,320.00 in all.", "1320", 1.0),
        ("The answer is 142", "142.0", 1.0),
        ("The answer is 142.", "142", 1.0),
        ("#### -5", "-5", 1.0),
        ("7 - 12 = \u22125", "-5", 1.0),
        ("#### $18 for 3 days", "18", 1.0),
        ("the result of 10-3", "3", 1.0),  # a subtraction, not a sign
        ("5 then 6", "5", 0.0),  # the last number counts
        ("#### 5\nno, 6", "5", 1.0),  # but the mark decides
        ("#### none, 5 is wrong\n#### so", "5", 0.0),
        ("12", "1,2", 0.0),
        ("0.5", ".5", 1.0),
        ("132.5", "132", 0.0),
        ("", "132", 0.0),
        ("one hundred", "100", 0.0),
    ],
    "math": [
        (r"thus \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{0.5}", r"\frac12", 1.0),
        (r"\boxed{142}", "142.0", 1.0),
        (r"\boxed{073}", "73", 1.0),
        (r"\boxed{2}", "['2']", 1.0),
        (r"\boxed{3}", "['2', '3']", 1.0),
        (r"\boxed{4}", "['2', '3']", 0.0),
        (r"\boxed{[1,2]}", "[1,2]", 1.0),
        (r"\boxed{1}", "[1,2]", 0.0),  # an interval, not two alternatives
        (r"\boxed{\left(3, \tfrac{\pi}{2}\right)}", r"\left( 3, \frac{\pi}{2} \right)", 1.0),
        (r"\boxed{(1,2)}", "(2,1)", 0.0),
        (r"\boxed{x=5}", "5", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"\boxed{\text{East}}", "east", 1.0),
        (r"\boxed{10,000}", "10000", 1.0),
        (r"\boxed{1} no, \boxed{2}", "2", 1.0),
        (r"\boxed{1} no, \boxed{2}", "1", 0.0),
        (r"\boxed{2} and \boxed{", "2", 0.0),  # the last box never closes
        (r"\boxed{}", "2", 0.0),
        (r"\boxed {7}", "7", 1.0),
        (r"the value is 6, see \boxed{8}", r"6", 0.0),
        ("The final answer is $\\frac{1}{2}$.", "0.5", 1.0),
        ("so #### 72", "48+24=72\n#### 72", 1.0),
        (r"\boxed{3}", r"Hence the area is \boxed{3}.", 1.0),
        ("no idea", "5", 0.0),
        ("", "5", 0.0),
    ],
    "boxed": [
        (r"\boxed{42}", "42", 1.0),
        (r"\boxed{ \dfrac{1}{2} }", r"\frac{1}{2}", 1.0),
        (r"\boxed{\left( a, b \right)}", "(a,b)", 1.0),
        (r"\boxed{\text{Evelyn}}", "Evelyn", 1.0),
        (r"\boxed{f\{1\}}", r"f\{1\}", 1.0),
        (r"\boxed{\{x \mid x > 0\}}", r"\boxed{\{x\mid x>0\}}", 1.0),
        (r"\boxed{a \} b}", r"a\}b", 1.0),
        (r"\boxed{1}\boxed{2}", "1", 0.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 0.0),
        ("42", "42", 0.0),
        (r"\boxed{42", "42", 0.0),
        (r"\boxed{\$42}", "42", 1.0),
    ],
    "exact": [
        ("24", "24", 1.0),
        (" 24\n", "24", 1.0),
        ("12+12\n#### 24", "24", 1.0),
        ("12+12\n#### 24", "5+19\n#### 24", 1.0),
        ("12+12=24\n24\n", "24", 1.0),
        ("a\nb", "a\nb", 1.0),
        ("x\nb", "a\nb", 0.0),
        ("12+12=24", "24", 0.0),
        ("24.0", "24", 0.0),
        ("#### 24\n#### 25", "24", 0.0),
        ("", "24", 0.0),
    ],
}


@pytest.mark.parametrize(
    ("name", "response", "truth", "expected"), [(n, *case) for n, cases in RIGHT_AND_WRONG.items() for case in cases]
)
def test_a_verifier_tells_right_from_wrong(name, response, truth, expected):
    assert REWARDS[name](response, truth) == expected


@pytest.mark.parametrize(
    ("name", "truth"), [("gsm8k", "none"), ("gsm8k", ""), ("math", ""), ("math", r"\boxed{}"), ("boxed", " "), ("exact", "####")]
)
def test_a_ground_truth_without_an_answer_is_an_error_not_a_zero(name, truth):
    with pytest.raises(ValueError, match="ground truth"):
        REWARDS[name]("5", truth)


@pytest.mark.parametrize("name", ["gsm8k", "boxed", "exact"])
@pytest.mark.parametrize("unit", ["9", "1,", "-", "{", "\\boxed{", "\\text{", "#", " "])
def test_textual_verifiers_take_linear_time_on_a_megabyte(name, unit):
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    assert REWARDS[name](text, "7") == 0.0
    assert REWARDS[name](f"\\boxed{{{text}", "7") == 0.0
    assert time.process_time() - start < 5  # takes up to 0.5 s; a quadratic scan would take minutes


def test_nested_boxes_give_the_innermost_last_one():
    assert last_boxed(r"\boxed{\boxed{3}}") == "3"
    assert last_boxed(r"\boxed{a{b{c}}d} tail}") == "a{b{c}}d"
    assert last_boxed("nothing") is None
    assert last_boxed(r"\boxed{1} \boxed{2") == ""
