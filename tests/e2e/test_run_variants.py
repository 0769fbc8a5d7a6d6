"""The same short run over other engines, ranks, transports, formats and with overlap."""

import json
from pathlib import Path

import pytest

from qurl.warmstart.model import make_tiny_model

pytestmark = pytest.mark.e2e

VARIANTS = {
    "overlap_on_two_engines_with_top_p": (
        "rollout.max_staleness=2", "rollout.num_engines=2", "quantization=none", "probe.every_steps=1", "rollout.top_p=0.8",
        "rollout.dtype=float32",
    ),
    "zero3_on_two_ranks_over_gloo_with_top_k": (
        "learner.num_ranks=2", "learner.zero_stage=3", "sync.transport=gloo", "rollout.engine_args.dtype=float32",
        "probe.every_steps=2", "rollout.top_k=5",
    ),
    "bf16_learner_with_scaling_and_kl": (
        "learner.dtype=bfloat16", "learner.zero_stage=1", "quantization=fp8_block", "algorithm=grpo_kl",
        "quantization.update_awareness=invariant_scaling",
    ),
    "tensor_parallel_with_deltas": ("rollout.tensor_parallel_size=2", "sync.delta=true", "quantization=nvfp4"),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_goes_through_and_a_killed_reward_process_costs_one_counted_error(command_line, tmp_path, name):
    arguments = command_line.train(name, command_line.reward("saboteur"), *VARIANTS[name])
    code, output = command_line.run(*arguments, QURL_TEST_VICTIM="reward", QURL_TEST_CALLS=str(tmp_path / "calls"))
    assert code == 0, output
    rows = command_line.metrics(name)
    assert [row["sync/weight_version"] for row in rows] == [1, 2, 3, 4]
    assert all(row["sync/retry_count"] == 0 and row["rollout/engine_restart_count"] == 0 for row in rows)
    assert all(0 <= row["rollout/staleness_max"] <= 2 for row in rows)
    assert any(row["policy/grad_norm"] > 0 for row in rows)
    assert sum(row["reward/error_count"] for row in rows) == 1
    if "overlap" in name:
        assert max(row["rollout/staleness_max"] for row in rows) > 0
        assert all(row["mismatch/quantization_kl"] == 0 for row in rows)
        assert all(row["mismatch/engine_kl"] < 1e-8 for row in rows if "mismatch/engine_kl" in row)  # of what top_p left
        assert all(1 < row["rollout/kept_tokens_mean"] < 300 for row in rows)
        assert all(("mismatch/staleness_kl" in row) == (row["rollout/staleness_max"] > 0) for row in rows)
    if "zero3" in name:
        assert all(row["rollout/kept_tokens_mean"] == 5 for row in rows)
        assert [("mismatch/quantization_kl" in row) for row in rows] == [True, False, True, False]
        for row in rows[::2]:  # the learner computes what an engine in float32 does, but for the order of sums
            assert row["mismatch/engine_kl"] < 0.01 * row["mismatch/quantization_kl"]
            assert row["mismatch/quantization_kl"] == pytest.approx(row["mismatch/kl_rollout_old"], rel=0.02)


def test_the_rollout_benchmark_measures_every_pair(command_line):
    code, output = command_line.run(
        "bench", "rollout", "--shapes", "tiny", "--batch-sizes", "1", "4", "--num-rounds", "3", "--steps-per-round", "2",
        "--num-threads", "1", "--json", "rows.json",
    )  # fmt: skip
    assert code == 0, output
    rows = json.loads((command_line.folder / "rows.json").read_text())
    pairs = {("none", "none"), ("int8", "none"), ("stock_int8", "none"), ("int8", "stock_int8")}
    found = {(row["batch_size"], row["format"], row["baseline"]) for row in rows}
    assert found == {(size, *pair) for size in (1, 4) for pair in pairs}
    assert all(0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"] for row in rows)


def test_a_run_falls_back_to_full_precision_and_resumes_inside_the_fallback(command_line):
    guard = ("guard.action=full_precision", "guard.max_kl=1e-6", "rollout.engine_args.dtype=float32")
    for num_steps in (2, 3):
        code, output = command_line.run(*command_line.train("fallback", *guard), f"num_steps={num_steps}")
        assert code == 0, output
    rows = command_line.metrics("fallback")
    assert [row["rollout/fallback"] for row in rows] == [0, 1, 1]
    for row in rows[1:]:  # float32 on both sides differs by the order of sums; the probe says what INT8 would be
        assert max(row["mismatch/kl_rollout_old"], row["mismatch/engine_kl"]) < 1e-9 < 1e-6 < row["mismatch/quantization_kl"] < 0.1


def test_live_engines_raise_their_precision_and_go_back_after_a_resume_inside_the_fallback(command_line):
    """An engine that a switch or an audit finds wanting is replaced, and would be counted."""
    guard = ("quantization=axbxp", "guard.action=raise_precision", "rollout.engine_args.dtype=float32", "probe.every_steps=1")
    for run in (("guard.max_kl=1e-6", "num_steps=2"), ("guard.max_kl=10", "guard.recovery_steps=1", "num_steps=4")):
        code, output = command_line.run(*command_line.train("raised", *guard), *run)
        assert code == 0, output
    rows = command_line.metrics("raised")
    assert [row["rollout/fallback"] for row in rows] == [0, 1, 1, 0]
    assert [row["rollout/engine_restart_count"] for row in rows] == [row["sync/retry_count"] for row in rows] == [0] * 4
    assert len({row["sync/bytes"] for row in rows}) == 1
    held_db = [row["quantization/sqnr_min_db"] for row in rows]  # after the row's switch: all blocks, all, two of four, two of four
    assert min(held_db[:2]) > 35 > 30 > max(held_db[2:])
    for row in rows:  # float32 on both sides: what is sampled is the configured policy, or int8's, which is nearer to the learner's
        if row["rollout/fallback"]:
            assert row["mismatch/kl_rollout_old"] == row["mismatch/engine_kl"] < 0.2 * row["mismatch/quantization_kl"]
        else:
            assert row["mismatch/engine_kl"] < 0.01 * row["mismatch/quantization_kl"]


def test_the_recipe_gsm8k_ppo_in_miniature_warms_its_critic_up_and_resumes(command_line):
    """Its very YAML: only the model, sizes and paths are others."""
    make_tiny_model(command_line.folder / "tiny_chat", chat=True)
    rows = [{"question": f"What is {n} plus 1?", "answer": f"#### {n + 1}"} for n in range(16)]
    (command_line.folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = Path(__file__).parent / "rewards" / "token_parity.py"
    arguments = (
        "train", "recipe=gsm8k_ppo", "model.path=tiny_chat", "data.train.path=questions.jsonl", "data.max_prompt_tokens=128",
        "data.eval.gsm8k.path=questions.jsonl", "rollout.num_prompts_per_step=8", "rollout.max_response_tokens=24",
        f"reward.function={reward}:score", "learner.max_tokens_per_micro_batch=512", "critic.num_warmup_iterations=1",
    )  # fmt: skip
    for num_steps in (2, 3):
        code, output = command_line.run(*arguments, f"num_steps={num_steps}")
        assert code == 0, output
    rows = command_line.metrics("gsm8k_ppo")
    assert [row["policy/num_optimizer_steps"] for row in rows] == [0, 4, 4]
    assert [row["critic/learning_rate"] for row in rows] == [1e-5] * 3
    assert [row.get("policy/learning_rate") for row in rows] == [None, 1e-6, 1e-6]
    assert rows[0]["critic/value_mean"] == 0 != rows[2]["critic/value_mean"] != rows[1]["critic/value_mean"]
    assert all(row["critic/grad_norm"] > 0 for row in rows) and all(row["policy/grad_norm"] > 0 for row in rows[1:])
