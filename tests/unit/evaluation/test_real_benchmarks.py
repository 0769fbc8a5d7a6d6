"""Published benchmark files read as `qurl eval` reads them. The folder that QURL_TEST_DATA names holds eval/{aime,amc,math}.json
(problem, answer) and eval/gsm8k.jsonl (question, answer)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qurl.evaluation.benchmarks import BENCHMARKS, load_problems
from qurl.rewards import REWARDS
from qurl.rewards.answers import reference_answer

DATA = Path(os.environ.get("QURL_TEST_DATA", "."))
pytestmark = pytest.mark.skipif("QURL_TEST_DATA" not in os.environ, reason="QURL_TEST_DATA names no folder")


@pytest.mark.parametrize(
    ("name", "file", "num_rows", "answers"),
    [
        ("aime24", "aime.json", 30, {0: "204"}),
        ("amc23", "amc.json", 83, {0: "142.0", 1: "144.0"}),
        ("math500", "math.json", 500, {0: r"\left( 3, \frac{\pi}{2} \right)", 1: "p - q"}),
        ("gsm8k", "gsm8k.jsonl", 1319, {0: "18", 1: "3"}),
    ],
)
def test_every_row_is_a_problem_with_an_answer_that_its_reward_accepts(name, file, num_rows, answers):
    problems = load_problems(name, str(DATA / "eval" / file), None)
    text = (DATA / "eval" / file).read_text()
    rows = json.loads(text) if file.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    assert len(problems) == len(rows) == num_rows
    assert [problem.text for problem in problems] == [row.get("problem", row.get("question")) for row in rows]
    assert [problem.answer for problem in problems] == [str(row["answer"]) for row in rows]
    assert {index: reference_answer(problems[index].answer) for index in answers} == answers
    right = REWARDS[BENCHMARKS[name].reward]
    for problem in problems[:: max(1, num_rows // 30)]:
        answer = reference_answer(problem.answer)
        response = f"#### {answer}" if name == "gsm8k" else f"\\boxed{{{answer}}}"
        assert right(response=response, ground_truth=problem.answer) == 1.0, answer
    assert [problem.row for problem in load_problems(name, str(DATA / "eval" / file), 7)] == list(range(7))
