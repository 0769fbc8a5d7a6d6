"""Whole runs through the command line: real vLLM, DeepSpeed and Ray; what ends them, and how they go on.

All of these runs are the same run: whatever happens on the way, the numbers must be those of the unbroken one."""

import json
import signal
from pathlib import Path

import pytest
from conftest import CommandLine, wait_until
from safetensors.torch import load_file

from qurl.cli.main import main
from qurl.quantization import FORMATS
from qurl.vllm_plugin import format_of

pytestmark = pytest.mark.e2e

SAME = ("reward/mean", "policy/loss", "policy/grad_norm", "policy/kl_old_current", "mismatch/kl_rollout_old", "rollout/num_tokens",
        "sync/changed_code_fraction")  # fmt: skip

EVALUATED = ("data.eval.held_out.path=sums.jsonl", "data.eval.held_out.max_rows=8", "evaluation.every_steps=1")


def numbers(rows):
    return [{key: row.get(key) for key in ("step", *SAME)} for row in rows]


@pytest.fixture(scope="module")
def unbroken(workspace, warm_workers):
    command_line = CommandLine(folder=workspace, mark="unbroken", workers=warm_workers)
    code, output = command_line.run(*command_line.train("unbroken", *EVALUATED))
    assert code == 0, output
    return command_line.metrics("unbroken")


def evaluations(command_line, name):
    lines = (command_line.folder / "runs" / name / "evaluations.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "timestamp"} for line in lines]


def test_a_run_logs_every_iteration_and_learns_from_informative_groups(unbroken):
    assert [row["step"] for row in unbroken] == [0, 1, 2, 3]
    assert all(row["policy/num_optimizer_steps"] == 2 for row in unbroken)
    assert any(row["policy/grad_norm"] > 0 for row in unbroken)
    assert all(row["rollout/staleness_max"] == 0 for row in unbroken)
    assert all(0 < row["mismatch/kl_rollout_old"] < 0.1 for row in unbroken)  # INT8 against float32 of the same weights
    assert unbroken[-1]["sync/changed_code_fraction"] > 0
    parts = ("rollout", "reward", "probe", "logprob", "update", "sync", "eval", "checkpoint", "idle")
    for row in unbroken:
        assert sum(row[f"time/{part}_s"] for part in parts) == pytest.approx(row["time/step_s"], abs=1e-6)


def test_a_run_is_exported_and_the_exports_are_models(command_line, unbroken, monkeypatch):
    code, output = command_line.run("export", "runs/unbroken", "exported")
    assert code == 0 and output == "exported\n", output
    code, output = command_line.run("quantize", "runs/unbroken", "quantized", "--format", "lobcq")
    assert code == 0 and output.endswith("quantized\n"), output
    monkeypatch.chdir(command_line.folder)  # what follows starts no other process
    before, after = (load_file(f"{name}/model.safetensors") for name in ("tiny", "exported"))
    assert before.keys() == after.keys() and not before["model.norm.weight"].equal(after["model.norm.weight"])
    assert main(command_line.train("again", "model.path=exported", command="plan")) == 0
    assert main(["export", "exported", "exported_int8", "--format", "int8"]) == 0
    [shard] = Path("exported_int8").glob("*.safetensors")
    codes = load_file(shard)
    for name, tensor in FORMATS["int8"].encode(after["model.layers.0.mlp.up_proj.weight"]).items():
        assert codes[f"model.layers.0.mlp.up_proj.{name}"].equal(tensor)
    assert format_of(json.loads(Path("quantized/config.json").read_text())["quantization_config"]) is FORMATS["lobcq"]
    packed = {name: tensor for shard in Path("quantized").glob("*.safetensors") for name, tensor in load_file(shard).items()}
    for name, tensor in FORMATS["lobcq"].encode(after["model.layers.0.mlp.up_proj.weight"]).items():
        assert packed[f"model.layers.0.mlp.up_proj.{name}"].equal(tensor)
    assert not list(Path().glob(".quantized*"))  # the exported checkpoint and the lock


def test_a_run_that_ctrl_c_and_sigterm_stop_goes_on_to_the_same_numbers(command_line, unbroken):
    """Each comes while the evaluation after an iteration is due, whose line is in metrics.jsonl already."""
    arguments = command_line.train("stopped", "checkpoint.every_steps=0", *EVALUATED)
    for stop in (signal.SIGINT, signal.SIGTERM):  # the second as of a preempted node
        before = len(command_line.metrics("stopped"))
        process = command_line.start(*arguments, "num_steps=1000")
        wait_until(lambda: len(command_line.metrics("stopped")) > before, process)  # noqa: B023
        process.send_signal(stop)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 130, output
        assert (command_line.folder / "runs/stopped/checkpoints/latest").exists()
        command_line.assert_nothing_is_left()
    num_steps = max(4, len(command_line.metrics("stopped")) + 1)
    for words in ("", f"trained for all {num_steps} steps"):
        code, output = command_line.run(*arguments, f"num_steps={num_steps}")
        assert code == 0 and words in output, output
    rows = command_line.metrics("stopped")
    assert [row["step"] for row in rows] == list(range(num_steps)) and numbers(rows[:4]) == numbers(unbroken)
    found = evaluations(command_line, "stopped")
    assert [row["step"] for row in found] == list(range(num_steps + 1)) and found[:5] == evaluations(command_line, "unbroken")
    assert all(row["eval/held_out/avg_at_k"] == found[row["step"] + 1]["eval/held_out/avg_at_k"] for row in rows)


def test_kill_9_in_the_middle_of_an_iteration_changes_no_number(command_line, unbroken, tmp_path):
    """Of a learner rank, which ends the run, then of an engine of the run that goes on, which is replaced."""
    arguments = command_line.train("killed", command_line.reward("saboteur"), "rollout.engine_args.max_num_seqs=4")
    for victim, expected in (("LearnerRank", 1), ("EngineActor", 0)):
        code, output = command_line.run(*arguments, QURL_TEST_VICTIM=victim, QURL_TEST_CALLS=str(tmp_path / victim))
        assert code == expected, output
        assert ("the same command goes on from the last checkpoint" in output) == (victim == "LearnerRank")
    rows = command_line.metrics("killed")
    assert rows[-1]["rollout/engine_restart_count"] == 1
    assert sum(row["rollout/redispatched_count"] for row in rows) > 0
    # What is computed together differs after a kill, and with it the last bits of logprobs; the samples are the same.
    for row, expected in zip(numbers(rows), numbers(unbroken), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
