"""What a person watches: a live page in a terminal, one plain line per step elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

SHOWN = {  # what the console shows of METRICS, where it was logged
    "reward": "reward/mean", "accuracy": "accuracy/train", "response tokens": "rollout/response_length_mean",
    "truncated": "rollout/truncated_fraction", "tokens/s": "rollout/tokens_per_s", "loss": "policy/loss",
    "entropy": "policy/entropy", "grad norm": "policy/grad_norm", "clipped high": "policy/clip_high_fraction",
    "critic explains": "critic/explained_variance",
    "KL rollout-old": "mismatch/kl_rollout_old", "ratio max": "mismatch/ratio_max",
    "quantization KL": "mismatch/quantization_kl", "engine KL": "mismatch/engine_kl",
    "engine KL floor": "mismatch/engine_kl_floor", "staleness KL": "mismatch/staleness_kl",
    "looping": "rollout/repetition_fraction", "fallback": "rollout/fallback", "stage": "rollout/stage",
    "batches sampled": "rollout/num_generations", "codes changed": "sync/changed_code_fraction",
    "update / noise": "quantization/update_to_noise_mean", "step s": "time/step_s",
}
STAGE_COLORS = {
    "rollout": "blue", "reward": "cyan", "probe": "bright_magenta", "logprob": "magenta", "update": "green", "sync": "yellow",
    "eval": "white", "checkpoint": "red", "idle": "bright_black",
}
BAR_WIDTH = 60


class SilentConsole:
    """Shows nothing; the interface of the others."""

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A finished iteration."""

    def log_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """A finished evaluation."""

    def stage(self, name: str, done: int | None, total: int | None) -> None:
        """What the run is at now."""

    def close(self) -> None:
        """Idempotent."""


class PlainConsole(SilentConsole):
    """One line per step and per evaluation, for log files and pipes."""

    def __init__(self, console: RichConsole, num_steps: int) -> None:
        self._console = console
        self._num_steps = num_steps

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [f"{label} {format_value(metrics[key])}" for label, key in SHOWN.items() if key in metrics]
        times = [f"{name} {seconds:.1f}" for name, seconds in stage_seconds(metrics).items()]
        where = f" ({', '.join(times)})" if times else ""
        self._line(f"step {step} ({step + 1}/{self._num_steps})  " + "  ".join(values) + where)

    def log_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [f"{key.removeprefix('eval/')} {format_value(value)}" for key, value in metrics.items()]
        self._line(f"eval at step {step}  " + "  ".join(values))

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveConsole(SilentConsole):
    """Progress over iterations, the current stage, a table of metrics and a bar of where the last step's time went."""

    def __init__(self, console: RichConsole, run_name: str, num_steps: int) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}", markup=True), BarColumn(BAR_WIDTH - 20), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), console=console,
        )
        self._task = self._progress.add_task(run_name, total=num_steps)
        self._stage = "starting"
        self._metrics: dict[str, float] = {}
        self._evals: dict[str, float] = {}
        self._live = Live(get_renderable=self.render, console=console, refresh_per_second=4)
        self._live.start()

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._progress.update(self._task, completed=step + 1)
        self._metrics = dict(metrics)

    def log_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        self._evals = {f"{key.removeprefix('eval/')} @{step}": value for key, value in metrics.items()}

    def stage(self, name: str, done: int | None, total: int | None) -> None:
        self._stage = name + ("" if done is None else f" {done}" if total is None else f" {done}/{total}")

    def close(self) -> None:
        self._stage = "closed"
        self._live.stop()

    def render(self) -> RenderableType:
        """The whole page."""
        shown = {label: self._metrics[key] for label, key in SHOWN.items() if key in self._metrics} | self._evals
        return Group(self._progress, Text(f"now: {self._stage}"), _metric_table(shown), time_bar(self._metrics))


def make_console(enabled: bool, run_name: str, num_steps: int) -> SilentConsole:
    """The console for this process's standard output."""
    console = RichConsole()
    if not enabled:
        return SilentConsole()
    return LiveConsole(console, run_name, num_steps) if console.is_terminal else PlainConsole(console, num_steps)


def format_value(value: float) -> str:
    """Four significant digits; large numbers without exponent."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"


def stage_seconds(metrics: Mapping[str, float]) -> dict[str, float]:
    """Stage -> seconds of the step, in the order of STAGE_COLORS, stages that took none left out."""
    return {name: metrics[f"time/{name}_s"] for name in STAGE_COLORS if metrics.get(f"time/{name}_s", 0.0) > 0}


def time_bar(metrics: Mapping[str, float]) -> Text:
    """One colored segment per stage, as long as its share of the step."""
    seconds = stage_seconds(metrics)
    total = sum(seconds.values())
    bar, legend = Text(), Text()
    for name, value in seconds.items():
        bar.append(" " * round(BAR_WIDTH * value / total), style=f"on {STAGE_COLORS[name]}")
        legend.append(f"{name} {100 * value / total:.0f}%  ", style=STAGE_COLORS[name])
    return Text("\n").join([bar, legend])


def _metric_table(values: Mapping[str, float], num_columns: int = 3) -> Table:
    table = Table.grid(padding=(0, 2))
    cells = []
    for label, value in values.items():
        cells += [Text(label, style="dim"), Text(format_value(value), justify="right")]
    for start in range(0, len(cells), 2 * num_columns):
        table.add_row(*cells[start : start + 2 * num_columns])
    return table
