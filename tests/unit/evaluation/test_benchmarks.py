"""The table of benchmarks, files of several layouts, and what is refused."""

from __future__ import annotations

import json
import string

import pytest

from qurl.evaluation.benchmarks import BENCHMARKS, PROMPTS, load_problems
from qurl.evaluation.config import EvalConfig, validate
from qurl.rewards import REWARDS


def write(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_names_a_prompt_and_a_reward_that_exist(name):
    benchmark = BENCHMARKS[name]
    assert benchmark.reward in REWARDS and benchmark.path.count("/") == 1
    fields = {field for _, field, _, _ in string.Formatter().parse(PROMPTS[benchmark.prompt]) if field is not None}
    assert fields == {"problem"}


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"problem": "1+1?", "answer": 2.0}, "2"),
        ({"question": "1+1?", "answer": "so\n#### 2"}, "so\n#### 2"),
        ({"question": "1+1?", "final_answer": ["2", "3"], "solution": "x"}, "['2', '3']"),
        ({"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}, "data_source": "x"}, "2"),
    ],
)
def test_a_file_may_have_any_of_the_known_layouts(tmp_path, row, answer):
    (problem,) = load_problems("amc23", write(tmp_path, [row]), None)
    assert (problem.text, problem.answer, problem.data_source) == ("1+1?", answer, "amc23")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "1+1?", "label": 2}], ["--data amc23", "line 1 has the columns text, label", "problem and answer"]),
        ([{"prompt": [], "reward_model": {}}], ["--data amc23", "has the columns prompt, reward_model"]),
        ([{"problem": "1+1?"}], ["--data amc23", "has the columns problem"]),
        ([{"problem": "a", "answer": "1"}, {"problem": "b", "answer": None}], ["--data amc23", "1 of 2 rows (line 2)"]),
        ([["a", "b"]], ["--data amc23", "is a list"]),
        ([], ["--data amc23", "holds no rows"]),
    ],
)
def test_a_file_that_is_no_benchmark_is_refused_with_what_was_found(tmp_path, rows, words):
    with pytest.raises(ValueError) as caught:
        load_problems("amc23", write(tmp_path, rows), None)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"benchmarks": ["aime26"]}, "benchmark 'aime26' is unknown; use aime24"),
        ({"benchmarks": []}, "--benchmarks is empty"),
        ({"benchmarks": ["amc23", "amc23"]}, "twice"),
        ({"data": {"aime25": "x.json"}}, "not evaluated"),
        ({"samples": 4, "temperature": 0.6, "k": [1, 8]}, "--k 8: pass@8 cannot be had from --samples 4; use --samples 8"),
        ({"k": [0]}, "--k 0"),
        ({"samples": 4}, "equal samples"),
        ({"samples": 0}, "--samples 0"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"max_problems": 0}, "--max-problems 0"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 1 << 70}, "from 0 to 4294967295"),
        ({"ignore": ["lm_head"]}, "--ignore with --format none"),
        ({"prompt": "solve it"}, "--prompt 'solve it'"),
        ({"reward_timeout_s": 0.0}, "--reward-timeout-s"),
    ],
)
def test_options_that_cannot_run_are_refused_by_name(changes, told):
    with pytest.raises(ValueError, match=".*") as caught:
        validate(EvalConfig(**{"model": "m", "benchmarks": ["amc23"], **changes}))
    assert told in str(caught.value)
    validate(EvalConfig(model="m", benchmarks=["amc23"]))
