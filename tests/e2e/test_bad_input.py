"""What only a started run can get wrong: it ends with one line and its exit code, and leaves no process behind."""

import signal
import time

import psutil
import pytest

pytestmark = pytest.mark.e2e


def left_over(command_line):
    """Command lines of living processes that carry the mark of this test."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("QURL_TEST_MARK") == command_line.mark:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def assert_nothing_is_left(command_line):
    deadline = time.monotonic() + 30
    while left := left_over(command_line):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def wait_for(path, process, text):
    deadline = time.monotonic() + 120
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_an_engine_argument_that_vllm_refuses_is_one_line(command_line):
    code, output = command_line.run(*command_line.train("refused", "rollout.engine_args.block_size=7"))
    assert code == 2
    assert len(output.splitlines()) == 1, output
    assert output.startswith("error: the rollout engine did not start: No common block size for 7")
    assert_nothing_is_left(command_line)


def test_ctrl_c_while_a_run_starts_ends_it_at_once(command_line):
    process = command_line.start(*command_line.train("starting"))
    wait_for(command_line.folder / "runs/starting/log.txt", process, "holds the output of engines")  # Ray is up, the rest is not
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert_nothing_is_left(command_line)


def test_sigterm_as_of_a_preempted_node_writes_a_checkpoint(command_line):
    process = command_line.start(*command_line.train("preempted", "checkpoint.every_steps=0", "num_steps=1000"))
    wait_for(command_line.folder / "runs/preempted/metrics.jsonl", process, "\n")
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert (command_line.folder / "runs/preempted/checkpoints/latest").exists()
    assert_nothing_is_left(command_line)


def test_rewards_that_raise_stop_the_run_by_a_guard(command_line, tmp_path):
    reward = tmp_path / "late.py"
    reward.write_text("def score(response, ground_truth):\n    return 1.0 if response == ground_truth else 1 / 0\n")
    code, output = command_line.run(*command_line.train("raising", f"reward.function={reward}:score"))
    assert code == 3, output
    assert "16 of 16 reward calls failed" in output and "ZeroDivisionError" in output
    assert "Traceback" not in output
