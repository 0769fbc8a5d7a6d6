"""What the guard answers, iteration by iteration."""

import logging
import math

import pytest

from qurl.config import GuardAction, GuardConfig
from qurl.trainer.guard import Guard

FINE = {"mismatch/kl_rollout_old": 0.001, "mismatch/ratio_max": 2.0, "rollout/repetition_fraction": 0.0}
PROBED = {"mismatch/quantization_kl": 0.001, "mismatch/quantization_ratio_max": 2.0}


def make(action, **changes):
    limits = {"max_kl": 0.01, "max_ratio": 100.0, "max_repetition": 0.2}
    return Guard(GuardConfig(**({"action": GuardAction[action]} | limits | changes)))


def judge_all(guard, iterations):
    """How the pool samples after each iteration, given by what differs from a fine one."""
    found = []
    for step, differences in enumerate(iterations):
        assert guard.judge(step, FINE | PROBED | differences) is None
        found.append(guard.full_precision)
    return found


def test_a_warning_names_key_value_limit_and_what_to_do_and_comes_once_while_it_lasts(caplog):
    with caplog.at_level(logging.WARNING):
        high = {"mismatch/kl_rollout_old": 0.0123}
        assert judge_all(make("warn"), [high, high, high, {}, high]) == [False] * 5
    assert [record.getMessage() for record in caplog.records] == [
        f"iteration {step}: mismatch/kl_rollout_old=0.0123 is above guard.max_kl=0.01; lower learner.learning_rate, or keep "
        "sensitive layers in full precision with quantization.ignore" for step in (0, 4)
    ]  # fmt: skip


@pytest.mark.parametrize("name, key, value", [
    ("max_kl", "mismatch/kl_rollout_old", 0.02), ("max_ratio", "mismatch/ratio_max", 101.0),
    ("max_repetition", "rollout/repetition_fraction", 0.25), ("max_kl", "mismatch/kl_rollout_old", math.nan),
])  # fmt: skip
def test_every_limit_stops_the_run_when_it_is_passed_and_only_where_it_is_set(name, key, value):
    guard = make("stop")
    assert guard.judge(0, FINE) is None and not guard.full_precision
    assert f"iteration 1: {key}={value:.4g} is above guard.{name}=" in guard.judge(1, FINE | {key: value})
    assert make("stop", **{name: None}).judge(1, FINE | {key: value}) is None


def test_the_limit_itself_is_within_and_so_is_what_an_iteration_does_not_say():
    assert make("stop").judge(0, FINE | {"mismatch/kl_rollout_old": 0.01}) is None
    assert make("stop").judge(0, {"rollout/repetition_fraction": 0.0}) is None


def test_full_precision_lasts_until_the_quantized_policy_is_well_below_every_limit_for_some_iterations():
    guard = make("full_precision", recovery_steps=2)
    iterations = [
        {}, {"mismatch/kl_rollout_old": 0.011},
        {"mismatch/quantization_kl": 0.006},  # below the limit, but not below half of it
        {}, {"mismatch/quantization_ratio_max": 51.0}, {"rollout/repetition_fraction": 0.11},
        {"mismatch/quantization_kl": math.nan},
        {"mismatch/kl_rollout_old": 9.9}, {},  # what the full-precision engine does is not the question
        {}, {"mismatch/ratio_max": 101.0},
    ]  # fmt: skip
    assert judge_all(guard, iterations) == [False] + [True] * 7 + [False, False, True]


def test_a_fallback_goes_on_after_a_resume_where_the_action_still_is_one():
    guard = make("full_precision", recovery_steps=3)
    assert judge_all(guard, [{"mismatch/ratio_max": 101.0}, {}]) == [True, True]
    resumed, changed = make("full_precision", recovery_steps=3), make("warn")
    for other in (resumed, changed):
        other.load_state_dict(guard.state_dict())
    assert judge_all(resumed, [{}, {}]) == [True, False]
    assert not changed.full_precision
