"""Everything a training run writes for people, behind one object that belongs to the driver.

    <run_dir>/metrics.jsonl       one object per iteration     rollouts/step_NNNNNN.jsonl  a few rollouts of each step
    <run_dir>/evaluations.jsonl   one object per evaluation    wandb/, wandb_id.txt        where logging.wandb is on
    <run_dir>/log.txt             Python logging

An iteration's line is written before the evaluation that follows it, whose values are added to the line: a run that ends while it
evaluates has the iteration on disk, and makes the evaluation when it is resumed. A resumed run repeats the steps after its
checkpoint, so it begins by dropping what an earlier process logged of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qurl.config.run import LoggingConfig, WandbMode
from qurl.observability.console import make_console
from qurl.observability.metrics import check_key
from qurl.observability.recorder import write_rollouts
from qurl.observability.step_log import StepLog
from qurl.observability.wandb_run import WandbRun
from qurl.types import ScoredGroup


class RunLogger:
    """The sinks of one run. Steps are numbered from 0."""

    def __init__(self, run_dir: Path, config: LoggingConfig, num_steps: int, resolved_config: Mapping[str, Any]) -> None:
        """resolved_config: the whole run's as plain data, for wandb.

        Raises ConfigError where wandb is asked for and does not start, ValueError for a broken file of an earlier process."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._config = config
        self._resolved_config = resolved_config
        self._metrics = StepLog(run_dir / "metrics.jsonl")
        self._evaluations = StepLog(run_dir / "evaluations.jsonl")
        self._wandb: WandbRun | None = None
        if config.wandb is not WandbMode.disabled:
            self._wandb = WandbRun(config, run_dir, self._resolved_config)
        self._log_handlers = _attach_log_handlers(run_dir / "log.txt")
        self._console = make_console(config.console, run_dir.name, num_steps)

    def begin(self, completed: int, evaluated: int) -> None:
        """Drop what an earlier process logged beyond the state that the run starts from.

        completed: finished iterations. evaluated: iterations before the last evaluation that counts; -1 for none."""
        self._metrics.drop_from(completed)
        self._evaluations.drop_from(evaluated + 1)

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A finished iteration. Raises KeyError for a key that is not in METRICS."""
        for key in metrics:
            check_key(key)
        self._metrics.append(step, metrics)
        self._console.log_step(step, metrics)
        if self._wandb:
            self._wandb.log(step, metrics)

    def log_eval(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """A finished evaluation, keys eval/<dataset>/...; step: training iterations done before it, 0 at the start.

        The line of the iteration before it gets the metrics too, and `seconds` in time/eval_s and time/step_s."""
        for key in metrics:
            check_key(key)

        def with_evaluation(line: dict[str, Any]) -> dict[str, float]:
            longer = seconds - (line.get("time/eval_s") or 0.0)  # else an evaluation made again would count twice
            return {**metrics, "time/eval_s": seconds, "time/step_s": (line.get("time/step_s") or 0.0) + longer}

        self._metrics.amend(step - 1, with_evaluation)
        self._evaluations.append(step, metrics)
        self._console.log_eval(step, metrics)
        if self._wandb:
            self._wandb.log(max(0, step - 1), metrics)

    def stage(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """What the run is at, e.g. ("rollout", 123, 256); console only, cheap enough for every rollout."""
        self._console.stage(name, done, total)

    def record_rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Write logging.num_rollouts_per_step of the step's rollouts, spread over the rewards they got."""
        if self._config.num_rollouts_per_step > 0:
            write_rollouts(self._run_dir / "rollouts", step, groups, self._config.num_rollouts_per_step)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: the wandb id, None without wandb. The files speak for themselves."""
        return {"wandb_id": self._wandb.run_id if self._wandb else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the checkpoint's wandb run where the run folder does not know it, as after copying only the checkpoint."""
        if self._wandb and state["wandb_id"] not in (None, self._wandb.run_id):
            self._wandb.close()
            self._wandb = WandbRun(self._config, self._run_dir, self._resolved_config, run_id=state["wandb_id"])

    def close(self) -> None:
        """Close every sink; idempotent."""
        self._console.close()
        self._metrics.close()
        self._evaluations.close()
        if self._wandb:
            self._wandb.close()
            self._wandb = None
        for handler in self._log_handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()
        self._log_handlers = []


class _LogFile(logging.FileHandler):
    """On a full disk the run itself says so, once; logging would print a traceback per record."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the record."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def _attach_log_handlers(path: Path) -> list[logging.Handler]:
    """log.txt gets qurl's records from INFO and everybody's from WARNING; standard error keeps getting warnings."""
    to_file = _LogFile(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    handlers: list[logging.Handler] = [to_file]
    if not root.handlers and logging.lastResort is not None:  # a handler on the root silences Python's handler of last resort
        handlers.append(logging.lastResort)
    for handler in handlers:
        root.addHandler(handler)
    logging.getLogger("qurl").setLevel(logging.INFO)
    return handlers
