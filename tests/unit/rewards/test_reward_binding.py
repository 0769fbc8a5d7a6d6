"""Calling conventions of reward functions."""

from __future__ import annotations

from functools import partial

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
