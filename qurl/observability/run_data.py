"""What a run folder says about its run, read back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qurl.config.plain import flat
from qurl.observability.step_log import read_step_log


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """One run; steps increase."""

    label: str  # unique in a report
    metrics: list[dict[str, Any]]  # one per iteration, at least one; null where a value was not finite
    evaluations: list[dict[str, Any]]  # "step" is the number of iterations done before
    config: dict[str, Any]  # dotted key -> value; empty where config.yaml is absent
    rollouts: list[dict[str, Any]]  # of the last step that has any

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric over iterations, or of an eval/ key over evaluations; what is not finite left out."""
        records = self.evaluations if key.startswith("eval/") else self.metrics
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None and math.isfinite(r[key])]
        return [step for step, _ in points], [value for _, value in points]

    def mean(self, key: str, last: int | None = None) -> float | None:
        """Mean of a metric over all iterations or the last few; None where it was never logged."""
        values = self.series(key)[1]
        values = values if last is None else values[-last:]
        return sum(values) / len(values) if values else None


def load_runs(run_dirs: list[Path]) -> list[RunData]:
    """Read run folders. Raises ValueError for no folder, or one that is missing, empty or broken, naming the file."""
    if not run_dirs:
        raise ValueError("a report needs at least one run folder")
    run_dirs = [d.resolve() for d in run_dirs]
    names = [d.name for d in run_dirs]
    return [_load_run(d, label=d.name if names.count(d.name) == 1 else str(d)) for d in dict.fromkeys(run_dirs)]


def _load_run(run_dir: Path, label: str) -> RunData:
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a folder; a report needs run folders, <output_dir>/<run_name>")
    metrics_file = run_dir / "metrics.jsonl"
    metrics = read_step_log(metrics_file)
    if not metrics:
        found = "is empty" if metrics_file.exists() else "does not exist"
        raise ValueError(f"{metrics_file} {found}; a report needs a run that finished an iteration")
    last_step = metrics[-1]["step"]
    return RunData(
        label=label,
        metrics=metrics,
        evaluations=_evaluations(metrics, read_step_log(run_dir / "evaluations.jsonl")),
        config=_read_config(run_dir / "config.yaml"),
        rollouts=_last_rollouts(run_dir / "rollouts", last_step),
    )


def _evaluations(metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluations by step; an iteration's own line may carry the one made after it."""
    within = [{**r, "step": r["step"] + 1} for r in metrics if any(key.startswith("eval/") for key in r)]
    by_step = {record["step"]: record for record in (*within, *evaluations)}
    return [by_step[step] for step in sorted(by_step)]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a configuration but a {type(config).__name__}")
    return flat(config)


def _last_rollouts(folder: Path, last_step: int) -> list[dict[str, Any]]:
    """Of the newest file up to last_step; an interrupted run may have left files of steps that were then repeated."""
    files = [f for f in sorted(folder.glob("step_*.jsonl")) if f.stem <= f"step_{last_step:06d}"]
    if not files:
        return []
    try:
        return [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{files[-1]} is not JSON lines ({error}); remove the file") from error
