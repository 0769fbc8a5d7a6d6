"""What each verifier calls right and wrong."""

from __future__ import annotations

import time

import pytest

from qurl.rewards import REWARDS, VOTES
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
        # what the benchmarks hold: units, percent, sets, intervals, points, bases, several values, lists as strings
        (r"\boxed{5.4}", r"5.4 \text{ cents}", 1.0),
        (r"\boxed{90}", r"90^\circ", 1.0),
        (r"\boxed{80}", r"80 \%", 1.0),
        (r"\boxed{1.8}", r"1\frac{4}{5}", 1.0),
        (r"\boxed{-2, 1}", "1,-2", 1.0),
        (r"\boxed{-2, 1, 3}", "1,-2", 0.0),
        (r"\boxed{\{-2, 1\pm\sqrt{5}\}}", r"\{1\pm\sqrt{5},-2\}", 1.0),
        (r"\boxed{(-\infty,2)\cup(3,\infty)}", r"(-\infty, 2) \cup (3, \infty)", 1.0),
        (r"\boxed{(-\infty,2)\cup(3,4)}", r"(-\infty, 2) \cup (3, \infty)", 0.0),
        (r"\boxed{[2,3]}", "[2,3)", 0.0),
        (r"\boxed{y=2x+3}", "y = 2x + 3", 1.0),
        (r"\boxed{(x,y)=(2,3)}", "(2,3)", 1.0),
        (r"\boxed{3,2}", "(2,3)", 0.0),  # a set has no order
        (r"\boxed{2,3}", "(2,3)", 0.0),
        (r"\boxed{(2,3)}", "2,3", 1.0),
        (r"\boxed{1011_2}", "1011_{2}", 1.0),
        (r"\boxed{1011}", "1011_2", 1.0),
        (r"\boxed{1011_3}", "1011_2", 0.0),
        (r"\boxed{11}", "1011_2", 0.0),
        (r"\boxed{2^{-98}}", r"\frac{1}{2^{98}}", 1.0),
        (r"\boxed{2^{-99}}", r"\frac{1}{2^{98}}", 0.0),  # six decimals do not tell them from 0
        (r"\boxed{0}", r"\frac{1}{2^{98}}", 0.0),
        (r"\boxed{0.3333333}", r"\frac13", 1.0),
        (r"\boxed{0.333}", r"\frac13", 0.0),
        (r"\boxed{4.5 \times 10^{33}}", "4.5e33", 1.0),  # Minerva's way of writing numbers
        (r"\boxed{4.6 \times 10^{33}}", "4.5e33", 0.0),
        (r"\boxed{0.00000016}", "1.6e-7", 1.0),
        (r"\boxed{1.7 \cdot 10^{-7}}", "1.6e-7", 0.0),
        (r"\boxed{1.6E-7}", r"1.6 \times 10^{-7}", 1.0),
        (r"\boxed{\frac{ \end \ -1}{2x^^}}", "-1", 0.0),  # a number in what is no mathematics is no answer
        (r"\boxed{" + "9" * 3000 + "}", "7", 0.0),  # too long for an answer
    ],
    "deepscaler": [
        (r"hm</think>\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"<think>hm</think> so \boxed{2}", "['2']", 1.0),
        (r"\boxed{2}", "2", 0.0),  # the thought never ended
        (r"\boxed{2}</think>", "2", 0.0),
        (r"\boxed{2}</think>the answer is 2", "2", 0.0),
        (r"\boxed{1}</think>\boxed{2}", "2", 1.0),
        (r"</think>\boxed{2}</think>\boxed{3}", "3", 1.0),
        (r"</think>\boxed{2} no, \boxed{3}", "2", 0.0),
        (r"</think>\boxed{", "2", 0.0),
        ("", "2", 0.0),
    ],
    "dapo": [
        ("Answer: 34", "34", 1.0),
        ("so\nANSWER : $34$.", "34", 1.0),
        ("Answer: 1\nAnswer: 34", "34", 1.0),
        ("Answer: 34\nAnswer: 1", "34", -1.0),
        ("Answer: 34\n" + "x" * 300, "34", -1.0),  # not in the last 300 characters
        ("x" * 300 + "\nAnswer: 34", "34", 1.0),
        ("Answer: 1,000", "1000", 1.0),
        ("Answer: 142", "142.0", 1.0),
        ("Answer: 142.5", "142.0", -1.0),
        (r"Answer: x = \boxed{34}", "34", 1.0),
        (r"Answer: \frac12", r"\frac{1}{2}", 1.0),
        (r"Answer: \sqrt2", r"\sqrt{2}", 1.0),
        (r"Answer: 34 \text{ degrees}", "34", 1.0),
        ("Answer: 90^\\circ", "90", 1.0),
        ("Answer: 1/2", "0.5", -1.0),  # text, no arithmetic
        ("Answer:\n34", "34", 1.0),
        ("the answer is 34", "34", -1.0),
        ("Answer:", "34", -1.0),
        ("Answer: 3", "['2', '3']", 1.0),
        ("", "34", -1.0),
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
    ("name", "truth"), [
    ("gsm8k", "none"), ("gsm8k", ""), ("dapo", ""), ("dapo", "$ $"), ("deepscaler", " "), ("math", "['']"), ("math", ""),
    ("math", r"\boxed{}"), ("boxed", " "), ("exact", "####")]
)  # fmt: skip
def test_a_ground_truth_without_an_answer_is_an_error_not_a_zero(name, truth):
    with pytest.raises(ValueError, match="ground truth"):
        REWARDS[name]("5", truth)


@pytest.mark.parametrize("name", ["gsm8k", "boxed", "exact", "dapo"])
@pytest.mark.parametrize("unit", ["9", "1,", "-", "{", "\\boxed{", "\\text{", "#", " "])
def test_textual_verifiers_take_linear_time_on_a_long_text(name, unit):
    text = unit * (300_000 // len(unit))
    start = time.process_time()
    for response in (text, f"\\boxed{{{text}", f"Answer: {text}"):
        assert REWARDS[name](response, "7") <= 0.0
        VOTES[name](response)
    assert time.process_time() - start < 5  # takes up to 0.2 s; a quadratic scan would take a minute


def test_nested_boxes_give_the_innermost_last_one():
    assert last_boxed(r"\boxed{\boxed{3}}") == "3"
    assert last_boxed(r"\boxed{a{b{c}}d} tail}") == "a{b{c}}d"
    assert last_boxed("nothing") is None
    assert last_boxed(r"\boxed{1} \boxed{2") == ""


def test_equal_votes_have_equal_rewards_and_no_vote_is_wrong():
    for name, cases in RIGHT_AND_WRONG.items():
        if name in ("math", "deepscaler", "exact"):
            continue  # arbitrary answers compared as mathematics may take any time; "exact" reads the whole text as well
        truths = {truth for _, truth, _ in cases}
        for truth in truths:
            found = {}
            for response in (response for response, _, _ in cases):
                vote = VOTES[name](response)
                if vote is not None:
                    assert found.setdefault(vote, REWARDS[name](response, truth)) == REWARDS[name](response, truth), (name, vote)


@pytest.mark.parametrize(
    ("name", "response", "vote"),
    [
        ("math", r"\boxed{ 142.0 }", "142"),
        ("math", r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}"),
        ("math", "142", None),
        ("boxed", r"\boxed{}", None),
        ("deepscaler", r"\boxed{1}</think>\boxed{2}", "2"),
        ("deepscaler", r"\boxed{1}", None),
        ("gsm8k", "#### 1,320.50", "1320.5"),
        ("gsm8k", "it is -0.0", "0"),
        ("gsm8k", "none", None),
        ("dapo", "Answer: $1,000$ dollars", "1000"),
        ("dapo", "1000", None),
        ("exact", "a\n b ", "b"),
        ("exact", " ", None),
    ],
)
def test_a_vote_is_the_answer_in_normal_form(name, response, vote):
    assert VOTES[name](response) == vote
