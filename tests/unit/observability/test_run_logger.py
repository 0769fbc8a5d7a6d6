import io
import json
import logging
import math
import subprocess
import sys

import pytest
from rich.console import Console

from qurl.config import LoggingConfig, WandbMode
from qurl.observability.console import LiveConsole, PlainConsole, make_console
from qurl.observability.run_logger import RunLogger
from qurl.observability.step_log import StepLog, read_step_log


@pytest.fixture
def new_logger(tmp_path):
    """Starts RunLoggers over one run folder, as one process after the other would."""
    started = []

    def start(**options):
        for earlier in started:
            earlier.close()
        started.append(RunLogger(tmp_path / "run", LoggingConfig(**{"console": False} | options), 10, {"seed": 0}))
        return started[-1]

    yield start
    for logger in started:
        logger.close()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_iteration_is_on_disk_as_soon_as_it_is_logged(new_logger, tmp_path):
    new_logger().log_step(0, {"reward/mean": 0.5, "policy/tokens": 7})
    (record,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert record.pop("timestamp") > 1e9
    assert record == {"step": 0, "reward/mean": 0.5, "policy/tokens": 7.0}


def test_a_resumed_run_has_every_step_once(new_logger, tmp_path):
    logger = new_logger()
    for step in range(5):
        logger.log_step(step, {"reward/mean": 0.0})
        logger.log_eval(step + 1, {"eval/a/avg_at_k": 0.0}, 1.0)
    state = logger.state_dict()
    logger = new_logger()
    logger.load_state_dict(state)
    logger.begin(3, 3)
    logger.log_step(3, {"reward/mean": 1.0})
    metrics, evaluations = (lines(tmp_path / "run" / f"{name}.jsonl") for name in ("metrics", "evaluations"))
    assert [(r["step"], r["reward/mean"]) for r in metrics] == [(0, 0.0), (1, 0.0), (2, 0.0), (3, 1.0)]
    assert [r["step"] for r in evaluations] == [1, 2, 3]
    assert ["eval/a/avg_at_k" in r for r in metrics] == [True, True, True, False]


def test_an_evaluation_joins_the_line_of_its_iteration_and_counts_its_seconds_once(new_logger, tmp_path):
    logger = new_logger()
    logger.log_eval(0, {"eval/a/avg_at_k": 0.1}, 9.0)  # of the start: no iteration is before it
    for step in (0, 1):
        logger.log_step(step, {"time/step_s": 10.0, "time/eval_s": 0.0, "time/idle_s": 10.0})
    for seconds in (7.0, 5.0):  # made again by a process that took the place of one which was killed
        logger.log_eval(2, {"eval/a/avg_at_k": 0.2}, seconds)
    first, second = lines(tmp_path / "run" / "metrics.jsonl")
    assert (first["time/step_s"], first.get("eval/a/avg_at_k")) == (10.0, None)
    assert (second["time/step_s"], second["time/eval_s"], second["eval/a/avg_at_k"]) == (15.0, 5.0, 0.2)
    assert [r["step"] for r in lines(tmp_path / "run" / "evaluations.jsonl")] == [0, 2]


def test_a_line_cut_short_by_a_kill_is_dropped_and_the_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = StepLog(path)
    log.append(0, {"reward/mean": 0.5})
    log.append(1, {"reward/mean": 0.6})
    log.close()
    path.write_text(path.read_text()[:-5])
    log = StepLog(path)
    log.append(1, {"reward/mean": 0.7})
    assert [(r["step"], r["reward/mean"]) for r in lines(path)] == [(0, 0.5), (1, 0.7)]


def test_a_killed_process_leaves_whole_lines(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from qurl.observability.step_log import StepLog
log = StepLog(Path(sys.argv[1]))
log.append(0, {"reward/mean": 0.5})
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "metrics.jsonl"
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=60).returncode == -9
    assert [r["step"] for r in lines(path)] == [0]


@pytest.mark.parametrize("bad", ["not json\n", "[1]\n", '{"step": null}\n', '{"reward/mean": 1}\n'])
def test_a_broken_line_is_refused_with_its_number(bad, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n' + bad + '{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_step_log(path)


def test_a_value_that_is_not_finite_becomes_null_and_is_named_in_the_log(new_logger, tmp_path):
    new_logger().log_step(0, {"policy/loss": math.nan, "policy/grad_norm": math.inf})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["policy/loss"] is None
    assert "policy/grad_norm is inf" in (tmp_path / "run" / "log.txt").read_text()


def test_a_key_outside_of_the_table_is_refused(new_logger):
    with pytest.raises(KeyError, match="policy/lsos"):
        new_logger().log_step(0, {"policy/lsos": 0.5})


def test_log_txt_has_our_information_and_the_warnings_of_others(new_logger, tmp_path):
    new_logger()
    logging.getLogger("qurl.trainer").info("ours")
    logging.getLogger("other").info("noise")
    logging.getLogger("other").warning("theirs")
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "ours" in text and "theirs" in text and "noise" not in text


def test_closing_twice_is_harmless_and_leaves_no_log_handler(new_logger):
    before = list(logging.getLogger().handlers)
    logger = new_logger()
    logger.close()
    logger.close()
    assert logging.getLogger().handlers == before


def test_outside_of_a_terminal_a_step_is_one_line(capsys):
    console = make_console(True, "run", 10)
    assert isinstance(console, PlainConsole)
    console.stage("rollout", 1, 2)
    console.log_step(3, {"reward/mean": 0.25, "rollout/tokens_per_s": 12345.6, "time/step_s": 3.0, "time/rollout_s": 2.0})
    console.log_eval(4, {"eval/[bold]/avg_at_k": 0.5})
    console.close()
    step, evaluation = capsys.readouterr().out.splitlines()
    assert step == "step 3 (4/10)  reward 0.25  tokens/s 12,346  step s 3 (rollout 2.0)"
    assert evaluation == "eval at step 4  [bold]/avg_at_k 0.5"


def test_in_a_terminal_progress_stage_metrics_and_time_are_shown():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=40)
    live = LiveConsole(console, "my run", 10)
    live.log_step(3, {"reward/mean": 0.25, "time/step_s": 4.0, "time/rollout_s": 3.0, "time/update_s": 1.0})
    live.log_eval(4, {"eval/gsm/avg_at_k": 0.5})
    live.stage("rollout", 123, 256)
    with console.capture() as capture:
        console.print(live.render())
    live.close()
    for text in ("my run", "4/10", "rollout 123/256", "0.25", "gsm/avg_at_k @4", "rollout 75%", "update 25%"):
        assert text in capture.get()


def test_a_silenced_console_writes_nothing(new_logger, capsys):
    logger = new_logger(console=False)
    logger.stage("rollout", 1, 2)
    logger.log_step(0, {"reward/mean": 0.5})
    assert capsys.readouterr().out == ""


def test_wandb_starts_resumes_its_run_and_survives_its_own_failures(new_logger, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = new_logger(wandb=WandbMode.offline)
    logger.log_step(0, {"reward/mean": 0.5})
    state = logger.state_dict()
    logger = new_logger(wandb=WandbMode.offline)
    logger.load_state_dict(state)
    assert logger.state_dict() == state and state["wandb_id"]
    assert all(state["wandb_id"] in d.name for d in (tmp_path / "run" / "wandb").glob("offline-run-*"))

    def fail(*_):
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(logger._wandb._run, "log", fail)
    logger.log_step(1, {"reward/mean": 0.6})
    assert [r["step"] for r in lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
    assert "wandb did not take step 1: Connection lost" in caplog.text


def test_wandb_that_cannot_start_stops_the_run_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    handlers = list(logging.getLogger().handlers)
    with pytest.raises(ValueError, match=r"logging\.wandb=offline"):
        RunLogger(tmp_path / "run", LoggingConfig(wandb=WandbMode.offline), 10, {})
    assert logging.getLogger().handlers == handlers
