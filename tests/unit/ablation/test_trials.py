"""Which runs an ablation comes to, and that each composes."""

import pytest

from qurl.ablation.outcomes import Outcomes
from qurl.ablation.trials import ARMS, BASELINE, COMPARISONS, plan_trials
from qurl.config import UpdateAwareness
from qurl.config.compose import compose
from qurl.config.validate import validate
from qurl.errors import ConfigError


def test_every_arm_runs_on_every_format_and_seed_and_the_baseline_once_per_seed():
    trials = plan_trials(list(ARMS), ["int8", "fp8"], [3, 5])
    assert len(trials) == 2 * (1 + 2 * (len(ARMS) - 1)) == len({trial.run_name for trial in trials})
    assert [trial.run_name for trial in trials if trial.arm == BASELINE] == ["bf16_3", "bf16_5"]
    assert [trial.seed for trial in trials] == sorted(trial.seed for trial in trials)


def test_every_trial_is_a_valid_run_that_differs_as_its_arm_says():
    configs = {}
    for trial in plan_trials(list(ARMS), ["int8"], [4]):
        config = compose(["recipe=ablation", *trial.overrides("out folder")])
        validate(config)
        assert (config.run_name, config.output_dir, config.seed) == (trial.run_name, "out folder", 4)
        configs[trial.arm] = config
    assert configs[BASELINE].quantization.format == "none"
    assert {arm: config.algorithm.correction.name for arm, config in configs.items()} == {
        BASELINE: "none", "naive": "naive", "none": "none", "decoupled": "decoupled", "tis": "tis", "acr": "acr",
        "acr_scaling": "acr", "acr_lr": "acr", "acr_rounding": "acr",
    }  # fmt: skip
    assert configs["acr_scaling"].quantization.update_awareness is UpdateAwareness.invariant_scaling
    assert configs["acr_rounding"].quantization.update_awareness is UpdateAwareness.stochastic_rounding
    assert configs["acr_lr"].learner.scaled_layers_multiplier == configs["acr_scaling"].quantization.invariant_scale == 1.5


def test_comparisons_name_arms():
    assert {arm for pair in COMPARISONS for arm in pair} == set(ARMS)


@pytest.mark.parametrize(
    ("arms", "formats", "seeds", "says"),
    [
        (["acr", "magic"], ["int8"], [0], "--arms magic: no such arm"),
        (["acr"], ["none"], [0], "full precision is the arm bf16"),
        (["acr"], ["int8", "int8"], [0], "--formats int8 int8: something is named twice"),
        (["acr"], ["int8"], [1, 1], "--seeds 1 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(arms, formats, seeds, says):
    with pytest.raises(ConfigError, match=says):
        plan_trials(arms, formats, seeds)


@pytest.mark.parametrize("content", ["", "[]", '{"asked": 1, "outcomes": {}}', '{"asked": {}, "outcomes": {"a": {"x": 1}}}'])
def test_outcomes_that_are_damaged_are_an_input_error(tmp_path, content):
    (tmp_path / "outcomes.json").write_text(content)
    with pytest.raises(ConfigError, match=r"outcomes\.json is damaged; remove it to begin anew, or use another --out"):
        Outcomes(tmp_path, {})
