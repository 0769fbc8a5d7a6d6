"""Every reward function of the table, and one that a user names by path, keeps the contract in a real pool."""

from __future__ import annotations

import asyncio

import pytest

from qurl.config import RewardConfig
from qurl.rewards import REWARDS, VOTES, RewardPool, check_reward_function
from qurl.types import Prompt, Rollout, RolloutGroup

RESPONSES = [
    "so\nAnswer: 24", "</think>so \\boxed{24}", "so\n#### 24",
    "so \\boxed{24}", "24", "25", "so \\boxed{25}", "", "\0", "\\boxed{", "24" * 5000,
    "\u0663\U0001f600",
]  # fmt: skip
RIGHT = {
    "dapo": "so\nAnswer: 24", "deepscaler": "</think>so \\boxed{24}", "gsm8k": "so\n#### 24",
    "math": "so \\boxed{24}", "boxed": "so \\boxed{24}", "exact": "24", "user": "24",
    "verl": "24",
}  # fmt: skip
USER = """
def reward(response, ground_truth, **extra):
    return float(response == ground_truth)

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth and extra_info["year"] == 1983)}
"""


def responses_to(prompt, texts):
    return RolloutGroup(prompt=prompt, rollouts=[
        Rollout(sample_index=i, token_ids=[], rollout_logprobs=[], weight_versions=[], finish_reason="stop", text=text,
                engine_id="e", seed=i) for i, text in enumerate(texts)
    ])  # fmt: skip


def test_every_reward_of_the_table_has_a_vote():
    assert VOTES.keys() == REWARDS.keys()


@pytest.fixture(params=[*sorted(REWARDS), "user", "verl"])
def named(request, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USER)
    paths = {"user": f"{path}:reward", "verl": f"{path}:compute_score"}
    return request.param, RewardConfig(function=paths.get(request.param, request.param), timeout_s=20)


def test_a_reward_function_is_a_finite_function_of_text(named):
    name, config = named
    prompt = Prompt(prompt_id="r0", token_ids=[1], text="12+12?", ground_truth="24", data_source="sums",
                    extra={"year": 1983, "solution": "12+12", "timeout": 3})  # fmt: skip
    check_reward_function(config, [prompt])

    async def twice():
        pool = RewardPool(config)
        await pool.start()
        try:
            return [await pool.score(responses_to(prompt, RESPONSES)) for _ in range(2)]
        finally:
            await pool.close()

    first, second = asyncio.run(twice())
    assert [r.error for r in first.rewards] == [None] * len(RESPONSES)
    values = [r.value for r in first.rewards]
    assert values == [r.value for r in second.rewards]
    assert values[RESPONSES.index(RIGHT[name])] == 1.0
    assert values[RESPONSES.index("25")] == values[RESPONSES.index("so \\boxed{25}")] == values[RESPONSES.index("")] <= 0.0
    assert set(values) <= {1.0, values[RESPONSES.index("")]}
