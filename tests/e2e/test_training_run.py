"""Whole runs through the command line: real vLLM, DeepSpeed and Ray; what ends them, and how they go on.

All of these runs are the same run: whatever happens on the way, the numbers must be those of the unbroken one."""

import signal
import time

import pytest
from safetensors.torch import load_file

from qurl.quantization import FORMATS

pytestmark = pytest.mark.e2e

SAME = ("reward/mean", "policy/loss", "policy/grad_norm", "policy/kl_old_current", "mismatch/kl_rollout_old", "rollout/num_tokens",
        "sync/changed_code_fraction")  # fmt: skip


def numbers(rows):
    return [{key: row.get(key) for key in ("step", *SAME)} for row in rows]


@pytest.fixture(scope="module")
def unbroken(workspace):
    from conftest import CommandLine

    command_line = CommandLine(folder=workspace, mark="unbroken")
    code, output = command_line.run(*command_line.train("unbroken"))
    assert code == 0, output
    return command_line.metrics("unbroken")


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


@pytest.mark.parametrize("format", ["none", "int8"])
def test_a_run_is_exported_and_the_export_is_a_model(command_line, unbroken, format):
    code, output = command_line.run("export", "runs/unbroken", f"exported_{format}", "--format", format)
    assert code == 0 and output == f"exported_{format}\n", output
    before, after = (load_file(command_line.folder / name / "model.safetensors") for name in ("tiny", "exported_none"))
    assert before.keys() == after.keys() and not before["model.norm.weight"].equal(after["model.norm.weight"])
    if format == "none":
        plan = command_line.run("plan", *command_line.train("again", "model.path=exported_none")[1:])
        assert plan[0] == 0, plan[1]
    else:
        [shard] = (command_line.folder / "exported_int8").glob("*.safetensors")
        codes = load_file(shard)
        for name, tensor in FORMATS["int8"].encode(after["model.layers.0.mlp.up_proj.weight"]).items():
            assert codes[f"model.layers.0.mlp.up_proj.{name}"].equal(tensor)


def test_a_run_continued_by_the_same_command_gives_the_same_numbers(command_line, unbroken):
    assert command_line.run(*command_line.train("halves", "num_steps=2"))[0] == 0
    code, output = command_line.run(*command_line.train("halves"))
    assert code == 0, output
    assert numbers(command_line.metrics("halves")) == numbers(unbroken)
    code, output = command_line.run(*command_line.train("halves"))
    assert code == 0 and "trained for all 4 steps" in output


def test_ctrl_c_writes_a_checkpoint_and_the_same_command_goes_on(command_line, unbroken):
    arguments = command_line.train("interrupted", "checkpoint.every_steps=0")
    process = command_line.start(*arguments)
    wait_for_metrics(command_line, "interrupted", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert (command_line.folder / "runs/interrupted/checkpoints/latest").exists()
    code, output = command_line.run(*arguments)
    assert code == 0, output
    assert numbers(command_line.metrics("interrupted")) == numbers(unbroken)


@pytest.mark.parametrize(("victim", "code"), [("EngineActor", 0), ("LearnerRank", 1)])
def test_kill_9_in_the_middle_of_an_iteration_changes_no_number(command_line, unbroken, tmp_path, victim, code):
    reward = "reward.function=" + str(__file__).replace("test_training_run.py", "rewards/saboteur.py") + ":score"
    name = f"killed_{victim}"
    arguments = command_line.train(name, reward, "rollout.engine_args.max_num_seqs=4")
    environment = {"QURL_TEST_VICTIM": victim, "QURL_TEST_CALLS": str(tmp_path / "calls")}
    found, output = command_line.run(*arguments, **environment)
    assert found == code, output
    if victim == "EngineActor":
        rows = command_line.metrics(name)
        assert rows[-1]["rollout/engine_restart_count"] == 1
        assert sum(row["rollout/redispatched_count"] for row in rows) > 0
    else:
        assert "the same command goes on from the last checkpoint" in output
        found, output = command_line.run(*arguments, **environment)
        assert found == 0, output
    # What is computed together differs after a kill, and with it the last bits of logprobs; the samples are the same.
    for row, expected in zip(numbers(command_line.metrics(name)), numbers(unbroken), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_a_killed_reward_process_costs_one_counted_error(command_line, tmp_path):
    reward = "reward.function=" + str(__file__).replace("test_training_run.py", "rewards/saboteur.py") + ":score"
    environment = {"QURL_TEST_VICTIM": "reward", "QURL_TEST_CALLS": str(tmp_path / "calls")}
    code, output = command_line.run(*command_line.train("killed_reward", reward), **environment)
    assert code == 0, output
    assert sum(row["reward/error_count"] for row in command_line.metrics("killed_reward")) == 1


def wait_for_metrics(command_line, name, process):
    """Until the first iteration is logged."""
    path = command_line.folder / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (path.exists() and path.read_text().count("\n") >= 1):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
