"""What only a started run can get wrong: it ends with one line and its exit code, and leaves no process behind."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import wait_until

from qurl.warmstart.model import make_tiny_model

pytestmark = pytest.mark.e2e


def test_an_engine_argument_that_vllm_refuses_is_one_line(command_line):
    code, output = command_line.run(*command_line.train("refused", "rollout.engine_args.block_size=7"))
    assert code == 2
    assert len(output.splitlines()) == 1, output
    assert output.startswith("error: the rollout engine did not start: No common block size for 7")
    command_line.assert_nothing_is_left()


def test_ctrl_c_while_a_run_starts_ends_it_at_once(command_line):
    process = command_line.start(*command_line.train("starting"))
    log = command_line.folder / "runs/starting/log.txt"
    wait_until(lambda: log.exists() and "holds the output of engines" in log.read_text(), process)  # Ray is up, the rest is not
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    command_line.assert_nothing_is_left()


def test_rewards_that_raise_stop_the_run_by_a_guard(command_line, tmp_path):
    reward = tmp_path / "late.py"
    reward.write_text("def score(response, ground_truth):\n    return 1.0 if response == ground_truth else 1 / 0\n")
    code, output = command_line.run(*command_line.train("raising", f"reward.function={reward}:score"))
    assert code == 3, output
    assert "16 of 16 reward calls failed" in output and "ZeroDivisionError" in output
    assert "Traceback" not in output


def test_a_step_that_raises_ends_the_run_with_its_message_once_another_engine_has_raised_it_too(command_line):
    """The engines' worker is one whose every step raises what pickle cannot read again."""
    worker = "rollout.engine_args.worker_extension_cls=raising_worker.Extension"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    code, output = command_line.run(*command_line.train("raises", worker), PYTHONPATH=path)
    assert code == 1, output
    raised = "KernelError: no kernel for this shape"
    assert raised in output, output
    first, *_, last = [line for line in output.splitlines() if raised in line]
    assert first.startswith("engine 0 was lost: a step raised (engine 0 on ") and first.endswith("starting another")
    assert last.startswith("engine 1 was lost: a step raised (engine 1 on ") and "the same exception" in last
    assert "Traceback" not in output and command_line.metrics("raises") == []
    command_line.assert_nothing_is_left()


def test_engines_that_compute_another_function_than_the_learner_are_refused_with_both_figures(command_line):
    """vLLM's llama scales logits by a key of config.json that transformers' does not know."""
    model = command_line.folder / "scaled"
    make_tiny_model(model, architecture="llama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"logit_scale": 0.5}))
    code, output = command_line.run(*command_line.train("scaled", "model.path=scaled", "rollout.dtype=float32"))
    assert code == 2, output
    assert len(output.splitlines()) == 1, output
    assert output.startswith("error: ") and "scaled: engine 0 and the learner compute different functions. Over " in output
    assert "mean logprob is -" in output and "quantization=int8 and dtype float32 explain 0.0" in output
    shutil.rmtree(model)
