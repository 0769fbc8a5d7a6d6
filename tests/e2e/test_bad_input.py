"""What only a started run can get wrong: it ends with one line and its exit code, and leaves no process behind."""

import signal

import pytest
from conftest import wait_until

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
