"""Records to figures, against loops written here."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from qurl.evaluation.config import EvalConfig
from qurl.evaluation.evaluate import output_folder, place_engines, saved_config
from qurl.evaluation.problems import fingerprint, parts_config
from qurl.evaluation.record import ProblemRecord, record_of
from qurl.evaluation.summary import summarize, table_rows
from qurl.types import Prompt, RewardResult, Rollout, RolloutGroup, ScoredGroup

PROMPT = Prompt(prompt_id="r0", token_ids=[1, 2], text="q", ground_truth="2", data_source="amc23")


def records(wrong):
    """Three problems of four samples; `wrong` is the reward of a wrong one."""
    rewards = {"a": [1.0, 1.0, wrong, None], "b": [wrong] * 4, "c": [1.0, wrong, wrong, wrong]}
    votes = {"a": ["2", "2", "3", None], "b": ["5", "6", "5", "5"], "c": ["2", "7", "7", "8"]}
    return [
        ProblemRecord(
            benchmark="amc23", problem=name, ground_truth="2", rewards=values, votes=votes[name], num_tokens=[2, 4, 6, 8],
            errors=["timeout" if value is None else None for value in values], truncated=[True, False, False, False],
            responses=[""] * 4,
        )
        for name, values in rewards.items()
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", [0.0, -1.0])
def test_the_figures_count_right_answers_whatever_a_wrong_one_is_worth(wrong):
    found = summarize(records(wrong), ks=[1, 4], has_votes=True, seed=0)
    assert found["avg_at_k"]["value"] == pytest.approx((2 / 4 + 0 + 1 / 4) / 3)
    assert found["pass_at_k"]["1"]["value"] == pytest.approx(found["avg_at_k"]["value"])
    assert found["pass_at_k"]["4"]["value"] == pytest.approx(2 / 3)
    assert found["maj_at_k"]["value"] == pytest.approx(1 / 3)
    assert (found["num_problems"], found["num_samples"], found["error_count"]) == (3, 4, 1)
    assert found["truncated_fraction"] == 0.25 and found["response_length_mean"] == 5.0
    assert found["avg_at_k"]["low"] <= found["avg_at_k"]["value"] <= found["avg_at_k"]["high"]


def test_the_order_in_which_problems_finished_changes_nothing():
    items = records(0.0) * 1
    random.Random(0).shuffle(items)
    assert summarize(items, [2], True, 0) == summarize(records(0.0), [2], True, 0)


def test_a_reward_without_votes_has_no_majority():
    found = summarize(records(0.0), [4], has_votes=False, seed=0)
    assert "maj_at_k" not in found
    header, row = table_rows({"amc23": found})
    assert dict(zip(header, row, strict=True))["maj@k"] == "-"
    assert dict(zip(header, row, strict=True))["pass@4"].startswith("66.7 [")


def test_a_record_keeps_all_that_figures_need():
    rollouts = [
        Rollout(sample_index=i, token_ids=[1] * n, rollout_logprobs=[], weight_versions=[], finish_reason=reason, text=text,
                engine_id="0", seed=0)
        for i, (n, reason, text) in enumerate([(2, "stop", r"\boxed{2.0}"), (3, "length", ""), (1, "stop", "9" * 500)])
    ]  # fmt: skip
    results = [RewardResult(value=1.0), RewardResult(value=0.0), RewardResult(value=None, error="timeout after 1 s")]
    scored = ScoredGroup(group=RolloutGroup(prompt=PROMPT, rollouts=rollouts), rewards=results)
    found = record_of("amc23", scored, lambda text: text.removeprefix(r"\boxed{").removesuffix("}") or None)
    assert found.rewards == [1.0, 0.0, None] and found.errors == [None, None, "timeout after 1 s"]
    assert found.votes[:2] == ["2.0", None] and found.votes[2].startswith("blake2b:")
    assert (found.num_tokens, found.truncated) == ([2, 3, 1], [False, True, False])
    assert record_of("amc23", scored, None).votes == [None] * 3


def test_the_saved_configuration_leaves_out_what_no_sample_depends_on():
    prompts = {"amc23": [PROMPT]}
    config = EvalConfig(model="runs/a", benchmarks=["amc23"], data={"amc23": "x.json"})
    saved = saved_config(config, "step_000004", prompts)
    assert saved["checkpoint"] == "step_000004" and saved["problems"] == fingerprint(prompts)
    same = replace(config, engines=2, k=[1], out="elsewhere", data={"amc23": "y.json"}, reward_workers=3)
    assert saved_config(same, "step_000004", prompts) == saved
    for change in ({"seed": 1}, {"format": "int8"}, {"temperature": 1.0}, {"engine_args": {"dtype": "float32"}}):
        assert saved_config(replace(config, **change), "step_000004", prompts) != saved
    changed = {"amc23": [replace(PROMPT, ground_truth="3")]}
    assert fingerprint(changed) != fingerprint(prompts)
    assert str(output_folder(config)) == "evals/a-none"
    precise = replace(config, format="axbxp", precision="k4-w1-a2")
    assert str(output_folder(precise)) == "evals/a-axbxp-k4-w1-a2"


def test_a_precision_by_layers_comes_from_a_file_and_is_what_counts(tmp_path):
    prompts = {"amc23": [PROMPT]}
    configs = []
    for name, setting in (("one", "k4-w1-a2"), ("same", "k4-w1-a2"), ("other", "k2-w4-a4")):
        (tmp_path / f"{name}.yaml").write_text(f"# found\ndown_proj: {setting}\n")
        path = str(tmp_path / f"{name}.yaml")
        configs.append(EvalConfig(model="runs/a", benchmarks=["amc23"], format="axbxp", precision=path))
    one, same, other = configs
    assert parts_config(one).quantization.precision == one.precision == {"down_proj": "k4-w1-a2"}
    assert output_folder(one) == output_folder(same) != output_folder(other)
    assert saved_config(one, None, prompts) == saved_config(same, None, prompts) != saved_config(other, None, prompts)


def test_engines_get_their_share_of_cores_or_gpus():
    config = EvalConfig(model="m", benchmarks=["amc23"], engines=2)
    assert place_engines(config, num_gpus=0, num_cores=8) == ("cpu", 4)
    assert place_engines(config, num_gpus=2, num_cores=8) == ("cuda", 4)
    with pytest.raises(ValueError, match="need 2 GPUs, 1 found"):
        place_engines(config, num_gpus=1, num_cores=8)
