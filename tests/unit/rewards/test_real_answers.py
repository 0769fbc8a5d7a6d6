"""Published ground truths verify as right, changed ones as wrong. Reads the folder that QURL_TEST_DATA names, which holds
eval/{aime,amc,math}.json (problem, answer) and eval/gsm8k.jsonl (question, answer)."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from test_reward_pool import group

from qurl.config import DatasetConfig, RewardConfig
from qurl.data import load_rows
from qurl.rewards import RewardPool
from qurl.rewards.answers import reference_answer

DATA = Path(os.environ.get("QURL_TEST_DATA", "."))
pytestmark = pytest.mark.skipif("QURL_TEST_DATA" not in os.environ, reason="QURL_TEST_DATA names no folder")


def changed(answer):
    """Another answer of the same kind."""
    try:
        return str(float(answer.replace(",", "")) + 1)
    except ValueError:
        return r"\text{nobody}" if "text" in answer else f"{answer}+1"


@pytest.mark.parametrize(
    ("name", "function", "keys"),
    [
        ("aime.json", "math", {}),
        ("amc.json", "math", {}),
        ("math.json", "math", {}),
        ("math.json", "boxed", {}),
        ("gsm8k.jsonl", "gsm8k", {"prompt_key": "question"}),
        ("gsm8k.jsonl", "math", {"prompt_key": "question"}),
    ],
)
def test_published_answers_are_right_and_changed_ones_wrong(name, function, keys):
    problems = load_rows(DatasetConfig(path=str(DATA / "eval" / name), **keys), "data.eval.real")
    form = "so\n#### {}" if function == "gsm8k" else "so $\\boxed{{{}}}$."
    answers = [reference_answer(problem.answer) for problem in problems]
    groups = [group(form.format(a), form.format(changed(a)), ground_truth=p.answer) for p, a in zip(problems, answers, strict=True)]

    async def run():
        pool = RewardPool(RewardConfig(function=function))
        await pool.start()
        try:
            return await asyncio.gather(*map(pool.score, groups))
        finally:
            await pool.close()

    for answer, scored in zip(answers, asyncio.run(run()), strict=True):
        assert [reward.value for reward in scored.rewards] == [1.0, 0.0], (answer, scored.rewards)
