"""What the guard answers, iteration by iteration."""

import json
import logging
import math
from dataclasses import replace

import pytest

from qurl.config import GuardAction, GuardConfig, QuantizationConfig
from qurl.trainer.guard import Guard, fallback

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
        found.append(guard.fallen_back)
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
    assert guard.judge(0, FINE) is None and not guard.fallen_back
    assert f"iteration 1: {key}={value:.4g} is above guard.{name}=" in guard.judge(1, FINE | {key: value})
    assert make("stop", **{name: None}).judge(1, FINE | {key: value}) is None


def test_the_limit_itself_is_within_and_so_is_what_an_iteration_does_not_say():
    assert make("stop").judge(0, FINE | {"mismatch/kl_rollout_old": 0.01}) is None
    assert make("stop").judge(0, {"rollout/repetition_fraction": 0.0}) is None


@pytest.mark.parametrize("action", ["full_precision", "raise_precision"])
def test_a_fallback_lasts_until_the_configured_policy_is_well_below_every_limit_for_some_iterations(action):
    guard = make(action, recovery_steps=2)
    iterations = [
        {}, {"mismatch/kl_rollout_old": 0.011},
        {"mismatch/quantization_kl": 0.006},  # below the limit, but not below half of it
        {}, {"mismatch/quantization_ratio_max": 51.0}, {"rollout/repetition_fraction": 0.11},
        {"mismatch/quantization_kl": math.nan},
        {"mismatch/kl_rollout_old": 9.9}, {},  # what the engine does in the fallback is not the question
        {}, {"mismatch/ratio_max": 101.0},
    ]  # fmt: skip
    assert judge_all(guard, iterations) == [False] + [True] * 7 + [False, False, True]


def test_a_fallback_goes_on_after_a_resume_where_the_action_still_is_one():
    guard = make("full_precision", recovery_steps=3)
    assert judge_all(guard, [{"mismatch/ratio_max": 101.0}, {}]) == [True, True]
    for action in ("full_precision", "raise_precision", "warn", "stop"):
        resumed = make(action, recovery_steps=3)
        resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
        if GuardAction[action].falls_back:
            assert resumed.fallen_back and judge_all(resumed, [{}, {}]) == [True, False]
        else:
            assert not resumed.fallen_back


def test_the_log_says_how_the_pool_samples_in_each_fallback_and_when_it_does_not_any_more(caplog):
    with caplog.at_level(logging.WARNING):
        for action in ("full_precision", "raise_precision"):
            assert judge_all(make(action, recovery_steps=1), [{"mismatch/kl_rollout_old": 0.02}, {}]) == [True, False]
    told = [record.getMessage() for record in caplog.records]
    assert "the pool samples in full precision until 1" in told[0] and "the pool samples with all blocks until 1" in told[2]
    assert told[1] == told[3] and told[1].endswith("the pool samples as configured again")


def test_a_fallback_is_another_quantization_of_the_same_layers():
    configured = QuantizationConfig(format="axbxp", precision={"down_proj": "k4-w1-a2"}, ignore=["o_proj"])
    assert fallback(GuardAction.raise_precision, configured) == replace(configured, precision="k4-w2-a2")
    assert fallback(GuardAction.full_precision, configured) == QuantizationConfig()
    assert fallback(GuardAction.warn, configured) is None and fallback(GuardAction.stop, configured) is None
