"""Published ground truths verify as right, changed ones as wrong. Reads the folder that QURL_TEST_DATA names, which holds
eval/{aime,amc,math}.json (problem, answer), eval/gsm8k.jsonl (question, answer) and train/ with more of the same."""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path

import pytest
from test_reward_pool import group

from qurl.config import DatasetConfig, RewardConfig
from qurl.data import load_rows
from qurl.rewards import RewardPool
from qurl.rewards.answers import reference_answer

DATA = Path(os.environ.get("QURL_TEST_DATA", "."))
pytestmark = pytest.mark.skipif("QURL_TEST_DATA" not in os.environ, reason="QURL_TEST_DATA names no folder")

FORMS = {  # how a response states its answer
    "boxed": "so $\\boxed{{{}}}$.",
    "dapo": "so\nAnswer: {}",
    "deepscaler": "perhaps \\boxed{{0.123}}?</think>so $\\boxed{{{}}}$.",
    "gsm8k": "so\n#### {}",
    "math": "so $\\boxed{{{}}}$.",
}


def changed(answer):
    """Another answer of the same kind: a number plus one, of anything else the last integer plus one, or one more term."""
    try:
        return str(float(answer.replace(",", "")) + 1)
    except ValueError:
        last = re.search(r"(?<![\d.^{])\d+(?![\d.]*\.\d)(?!.*\d)", answer)
        if "," in answer and last is not None:  # points, intervals, sets
            return f"{answer[: last.start()]}{int(last[0]) + 1}{answer[last.end() :]}"
        return r"\text{nobody}" if re.search(r"\\(text|mbox)\{|^[A-Za-z ]+$", answer) else f"{answer}+1"


def answered(path, folder):
    """The file, or a copy without the rows that have no answer."""
    rows = json.loads(path.read_text()) if path.suffix == ".json" else [json.loads(line) for line in path.open()]
    copy = folder / f"{path.stem}.jsonl"
    copy.write_text("".join(json.dumps(row) + "\n" for row in rows if row["answer"] not in (None, "")))
    return copy


@pytest.mark.parametrize(
    ("name", "function"),
    [
        *((f"{part}.json", function) for part in ("eval/aime", "eval/amc", "eval/math", "train/aime_1983_2023")
          for function in ("math", "deepscaler", "dapo", "boxed")),
        *(("eval/gsm8k.jsonl", function) for function in ("gsm8k", "math", "dapo")),
        *(("train/gsm8k.jsonl", function) for function in ("gsm8k", "dapo")),
        *(("train/math.json", function) for function in ("math", "dapo", "boxed")),
    ],
)  # fmt: skip
def test_published_answers_are_right_and_changed_ones_wrong(name, function, tmp_path):
    keys = {"prompt_key": "question"} if "gsm8k" in name else {}
    problems = load_rows(DatasetConfig(path=str(answered(DATA / name, tmp_path)), **keys), "data.eval.real")
    form = FORMS[function]
    answers = [reference_answer(problem.answer) for problem in problems]
    groups = [group(form.format(a), form.format(changed(a)), ground_truth=p.answer) for p, a in zip(problems, answers, strict=True)]

    async def run():
        pool = RewardPool(RewardConfig(function=function))
        await pool.start()
        try:
            return await asyncio.gather(*map(pool.score, groups))
        finally:
            await pool.close()

    wrong = -1.0 if function == "dapo" else 0.0
    found = [[reward.value for reward in scored.rewards] for scored in asyncio.run(run())]
    unexpected = [(answer, values) for answer, values in zip(answers, found, strict=True) if values != [1.0, wrong]]
    assert not unexpected
