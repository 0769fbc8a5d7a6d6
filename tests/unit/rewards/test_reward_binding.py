"""Calling conventions of reward functions."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from fractions import Fraction
from functools import partial

import numpy as np
import pytest

from qurl.config import RewardConfig
from qurl.rewards import REWARDS
from qurl.rewards.binding import bind
from qurl.types import Prompt

PROMPT = Prompt(
    prompt_id="r0", token_ids=[1], text="q", ground_truth="2", data_source="aime", extra={"year": 1983, "response": "no"}
)


def call(function, is_builtin=False, **kwargs):
    return bind(function, RewardConfig(function="f", kwargs=kwargs), is_builtin)("hello", PROMPT)


def test_the_native_convention_receives_everything_a_row_carried():
    seen = {}

    def reward(response, ground_truth, **extra):
        seen.update(extra, response=response, ground_truth=ground_truth)
        return 0.5

    assert call(reward, bonus=2) == 0.5
    assert seen == {"response": "hello", "ground_truth": "2", "data_source": "aime", "year": 1983, "bonus": 2}


def test_a_function_without_extra_receives_only_what_it_names():
    assert call(lambda response, ground_truth: float(len(response + ground_truth))) == 6.0
    assert call(lambda ground_truth, response: float(response == "hello")) == 1.0
    assert call(lambda text, answer: float((text, answer) == ("hello", "2"))) == 1.0
    assert call(lambda response, ground_truth, year: float(year)) == 1983.0
    assert call(lambda response, ground_truth, scale=1: float(scale), scale=3) == 3.0
    assert call(partial(lambda scale, response, ground_truth: float(scale), 4)) == 4.0


def test_the_verl_convention_is_recognized_and_its_score_taken():
    seen = []

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        seen.append((data_source, solution_str, ground_truth, extra_info))
        return {"score": 0.75, "acc": True}

    assert call(compute_score) == 0.75
    assert seen == [("aime", "hello", "2", PROMPT.extra)]
    assert call(lambda data_source, solution_str, ground_truth: 1) == 1.0
    assert call(lambda data_source, solution_str, ground_truth, extra_info=None, **kwargs: kwargs["bonus"], bonus=2) == 2.0


@pytest.mark.parametrize("result", [{"acc": 1.0}, {"score": None}, {"score": float("nan")}])
def test_a_dict_without_a_finite_score_is_an_error(result):
    with pytest.raises((TypeError, ValueError), match="returned"):
        call(lambda data_source, solution_str, ground_truth, extra_info=None: result)


def test_kwargs_that_fit_no_parameter_are_refused():
    with pytest.raises(ValueError, match="reward.kwargs: typo"):
        call(lambda response, ground_truth: 1.0, typo=1)
    with pytest.raises(ValueError, match="reward.kwargs: typo"):
        call(REWARDS["math"], is_builtin=True, typo=1)
    with pytest.raises(ValueError, match="reward.kwargs: response"):
        call(lambda response, ground_truth: 1.0, response="x")


@pytest.mark.parametrize("function", [lambda: 1.0, lambda response: 1.0, lambda *both: 1.0, 3, None])
def test_other_signatures_are_refused(function):
    with pytest.raises(ValueError, match="reward.function='f'"):
        call(function)


ROW = Prompt(
    prompt_id="r0", token_ids=[1], text="q?", ground_truth='{"target": 3}', data_source="countdown", truth={"target": 3},
    extra={"difficulty": 2, "boxless": "anywhere"},
)  # fmt: skip


def label_first(label, solution_str):
    return float((label, solution_str) == ("2", "hello"))


@pytest.mark.parametrize(
    "function",
    [
        lambda ground_truth, completion: float((completion, ground_truth) == ("hello", "2")),
        label_first,
        lambda answer, response: float((response, answer) == ("hello", "2")),
        lambda answer, ground_truth: float((answer, ground_truth) == ("hello", "2")),
        lambda prompt, completion, answer: float((prompt, completion, answer) == ("q", "hello", "2")),
        lambda response, ground_truth, extra_info: float(extra_info == PROMPT.extra),
        lambda response, ground_truth, finish_reason: float(finish_reason == "stop"),
        lambda response, **columns: float((response, columns["ground_truth"]) == ("hello", "2")),
        lambda gold, prediction, *, data_source: float((gold, prediction, data_source) == ("2", "hello", "aime")),
    ],
)
def test_names_decide_which_parameter_takes_what(function):
    assert call(function) == 1.0


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda a, b: 1.0, "response and ground truth"),
        (lambda text, year: 1.0, "the ground truth"),
        (lambda response, completion, answer: 1.0, "response and completion could each be meant"),
        (lambda response, answer, label: 1.0, "answer and label could each be meant"),
        (lambda prompts, completions, **columns: [1.0], "response and ground truth"),
        (lambda response, ground_truth, /: 1.0, "response and ground truth"),
    ],
)
def test_names_that_do_not_decide_are_refused(function, words):
    with pytest.raises(ValueError, match=words) as caught:
        call(function)
    assert "use (response, ground_truth" in str(caught.value)


@pytest.mark.parametrize("result", ["np.bool_(True)", "np.float32(1)", "np.array(True)", "True", "1", "Fraction(1)"])
def test_whatever_is_a_number_is_a_reward(result):
    value = call(lambda response, ground_truth: eval(result, {"np": np, "Fraction": Fraction}))
    assert value == 1.0 and isinstance(value, float)


def test_an_async_reward_is_awaited():
    async def reward(response, ground_truth):
        await asyncio.sleep(0)
        return 0.5

    assert call(reward) == 0.5


def test_an_object_reaches_a_reward_as_it_is_stored():
    score = bind(lambda solution_str, ground_truth: float(ground_truth["target"]), RewardConfig(function="f"), False)
    assert score("hello", ROW) == 3.0


def test_a_row_s_columns_set_no_option_of_a_reward_of_ours():
    score = bind(REWARDS["math"], RewardConfig(function="math"), True)
    assert score("\\boxed{6} so it is 5", Prompt(**{**asdict(ROW), "ground_truth": "5", "truth": None})) == 0.0


def test_the_parts_of_a_dict_are_kept_beside_its_score():
    given = {"score": 0.1, "acc": False, "format": np.float32(0.5), "pred": "7", "bad": float("nan")}
    result = call(lambda response, ground_truth: given)
    assert (result, result.parts) == (0.1, {"acc": 0.0, "format": 0.5})
