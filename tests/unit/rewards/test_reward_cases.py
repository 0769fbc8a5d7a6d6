"""Answers that verifiers are known to judge wrongly, by kind; `cases.jsonl` has one a line."""

from __future__ import annotations

import collections
import json
import time
from pathlib import Path

import pytest

from qurl.rewards import REWARDS

CASES = collections.defaultdict(list)
for line in (Path(__file__).parent / "cases.jsonl").read_text().splitlines():
    CASES[json.loads(line)["kind"]].append(json.loads(line))
MAX_CPU_S = 2.0


@pytest.fixture(scope="module", autouse=True)
def libraries():
    import math_verify  # noqa: F401  (a worker of the pool has loaded it before its first response)


@pytest.mark.parametrize("kind", sorted(CASES))
def test_answers_of_a_kind_are_judged_right(kind):
    wrong = []
    for case in CASES[kind]:
        begin = time.process_time()
        value = REWARDS[case["reward"]](case["response"], case["ground_truth"])
        if (value == 1.0) != bool(case["right"]) or time.process_time() - begin > MAX_CPU_S:
            wrong.append((case, value))
    assert not wrong


def test_a_response_that_was_cut_gives_no_answer_unless_asked_for():
    math = REWARDS["math"]
    assert math("\\boxed{7} and", "7", finish_reason="stop") == 1.0
    assert math("\\boxed{7} and", "7", finish_reason="length") == 0.0
    assert math("\\boxed{7} and", "7", finish_reason="length", truncated=True) == 1.0


def test_a_thought_that_the_prompt_opened_must_end():
    math = REWARDS["math"]
    assert math("\\boxed{7}", "7", prompt="1+6?<think>\n") == 0.0
    assert math("hm</think>\\boxed{7}", "7", prompt="1+6?<think>\n") == 1.0


@pytest.mark.parametrize(
    ("boxless", "rewards"), [("none", (0.0, 0.0, 1.0)), ("stated", (0.0, 1.0, 1.0)), ("anywhere", (1.0, 1.0, 1.0))]
)
def test_what_counts_without_a_box_is_a_switch(boxless, rewards):
    texts = ("so it is 7", "The answer is 7.", "\\boxed{7}")
    assert tuple(REWARDS["math"](text, "7", boxless=boxless) for text in texts) == rewards
    with pytest.raises(ValueError, match="reward.kwargs.boxless='all' is unknown; use one of none, stated, anywhere"):
        REWARDS["math"]("7", "7", boxless="all")
