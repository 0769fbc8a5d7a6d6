"""Before a run each row's ground truth must be paid in the reward's own form."""

from __future__ import annotations

import time

import pytest
from test_reward_pool import prompt

from qurl.config import RewardConfig, Unpayable
from qurl.rewards import REWARDS, payable
from qurl.rewards.forms import FORMS, WRONG, stated


def prompts(*truths):
    return [prompt(prompt_id=f"r{row:06d}", ground_truth=truth) for row, truth in enumerate(truths)]


TRUTHS = {
    "boxed": ["72", "72.0", "['72', '73']", r"\frac{1}{2}", r"so \boxed{5}", "1\n#### 5", "033"],
    "dapo": ["72", "72.0", "['72', '73']", r"\frac{1}{2}", r"so \boxed{5}", "033", "a house"],
    "deepscaler": ["72", "72.0", "['72', '73']", r"\frac{1}{2}", r"so \boxed{5}", "033", "[2,3)"],
    "exact": ["72", "72.0", "['72', '73']", "a\nb", "1\n#### 5", "033"],
    "gsm8k": ["72", "72.0", "['72', '73']", "1\n#### 5", "033", "$1,000", "3/4", "1e+22", "5 apples"],
    "math": ["72", "72.0", "['72', '73']", r"\frac{1}{2}", r"so \boxed{5}", "033", "[2,3)", r"5 \text{ cm}", "east"],
}
UNPAYABLE = {"boxed": r"\text{a", "gsm8k": "12:30", "math": r"\frac{1}{2", "deepscaler": "$", "dapo": "$ $", "exact": "#### "}


def test_every_reward_has_a_form_and_a_value_for_wrong_answers():
    assert FORMS.keys() == WRONG.keys() == REWARDS.keys() == TRUTHS.keys()
    for name, wrong in WRONG.items():
        assert REWARDS[name]("nothing of the kind", "7") == wrong
        assert REWARDS[name](stated(name, "7"), "7") == 1.0


@pytest.mark.parametrize("name", sorted(FORMS))
def test_rows_that_can_be_paid_pass_and_others_are_named_dropped_or_kept(name):
    rows = prompts(*TRUTHS[name], UNPAYABLE[name])
    assert payable(RewardConfig(function=name), rows[:-1], "data.train") == rows[:-1]
    with pytest.raises(ValueError) as caught:
        payable(RewardConfig(function=name), rows, "data.train.path=a.jsonl")
    for word in ("data.train.path=a.jsonl", f"reward.function={name!r}", f"1 of {len(rows)} rows", "unpayable=drop"):
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    assert payable(RewardConfig(function=name, unpayable=Unpayable.drop), rows, "data.train") == rows[:-1]
    assert payable(RewardConfig(function=name, unpayable=Unpayable.keep), rows, "data.train") == rows


def test_a_set_of_which_no_row_can_be_paid_is_refused_even_where_rows_may_be_dropped():
    with pytest.raises(ValueError, match="2 of 2 rows"):
        payable(RewardConfig(function="gsm8k", unpayable=Unpayable.drop), prompts("Evelyn", "12:30"), "data.train")


def test_a_row_whose_answer_is_its_own_text_costs_no_mathematics():
    truths = [rf"\frac{{{i}}}{{7}}+\sqrt{{{i}}}" for i in range(1000)]
    begin = time.process_time()
    assert all(REWARDS["math"](stated("math", truth), truth) == 1.0 for truth in truths)
    assert time.process_time() - begin < 2  # takes 0.1 s; parsing them would take a minute


def test_somebody_s_own_reward_scores_one_row_only(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def f(response, ground_truth): return float(ground_truth) - 7")
    rows = prompts("7", "Evelyn")
    assert payable(RewardConfig(function=f"{path}:f"), rows, "data.train") == rows
    with pytest.raises(ValueError, match="could not convert"):
        payable(RewardConfig(function=f"{path}:f"), rows[1:], "data.train")
