"""Whether a format pays in a whole iteration: the measured times of a run, and what two benchmarks say of other formats.

An iteration of T seconds has R of rollouts and S of weight sync. In another format R becomes R / ratio, where ratio is the decoding
speed of that format over the run's own (`qurl bench rollout`), and S becomes S * cost (`qurl bench sync`); all else stays. So

    speed-up     T / (T - R (1 - 1/ratio) + S (cost - 1))
    break-even   S (cost - 1) / (T (1 - 1/ratio)), the part of an iteration that rollouts must be for the format to pay

This is a model: prefill is taken to gain what decoding gains, responses to keep their length, and rollouts to hide nothing, so the
run should be one that alternates (`max_staleness` 0)."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qurl.observability.run_data import RunData, load_runs


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakEvenRow:
    """One format in place of the run's own."""

    speed_up: float  # of an iteration, over the run's
    format: str
    decoding_ratio: float  # speed over that of the run's format
    sync_cost: float  # seconds of an update over those of the run's format
    rollout_share: float  # of the run's iterations
    sync_share: float
    break_even_share: float  # of rollouts, from which on the format pays; inf: it never does
    iteration_s: float  # expected


def run_break_even(
    run: Path, rollout: Path, sync: Path, *, shape: str | None = None, batch_size: int | None = None, transport: str | None = None
) -> list[BreakEvenRow]:
    """A row for each other format that both files have, the fastest iteration first.

    rollout, sync: what the benchmarks wrote with --json. shape, batch_size and transport may be None where the files have one.
    Raises ValueError where a file does not fit, or one lacks the run's own format."""
    data = load_runs([run])[0]
    own = str(data.config.get("quantization.format"))
    speed = _decoding_speeds(_read(rollout, "qurl bench rollout --json", "ratio"), shape, batch_size, rollout)
    cost = _sync_costs(_read(sync, "qurl bench sync --json", "total_ratio"), transport, sync)
    for path, table in ((rollout, speed), (sync, cost)):
        if own not in table:
            raise ValueError(f"{path} has {', '.join(table)} and not {own}, which {run} had; measure again with it in --formats")
    times = _times(data)
    rows = [_row(name, speed[name] / speed[own], cost[name] / cost[own], times) for name in speed if name in cost and name != own]
    if not rows:
        raise ValueError(f"{rollout} and {sync} have no format in common but {own}; measure more --formats")
    return sorted(rows, key=lambda row: -row.speed_up)


def _row(name: str, ratio: float, cost: float, times: Mapping[str, float]) -> BreakEvenRow:
    step, rollout, sync = times["time/step_s"], times["time/rollout_s"], times["time/sync_s"]
    gain, loss = 1.0 - 1.0 / ratio, sync * (cost - 1.0)
    expected = step - rollout * gain + loss
    return BreakEvenRow(
        speed_up=step / expected, format=name, decoding_ratio=ratio, sync_cost=cost, rollout_share=rollout / step,
        sync_share=sync / step, break_even_share=max(loss, 0.0) / (step * gain) if gain > 0 else math.inf, iteration_s=expected,
    )  # fmt: skip


def _times(run: RunData) -> dict[str, float]:
    """Medians over iterations, but for the first, which warms up."""
    times = {}
    for key in ("time/step_s", "time/rollout_s", "time/sync_s"):
        values = run.series(key)[1]
        if not values:
            raise ValueError(f"{run.label} has no {key} in its metrics.jsonl; use a run of `qurl train`")
        times[key] = statistics.median(values[1:] or values)
    return times


def _read(path: Path, source: str, key: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not rows or any(key not in row for row in rows):
            raise ValueError(f"no {key} in its rows")
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no output of `{source}`: {error}") from error
    return rows


def _decoding_speeds(rows: Sequence[Mapping[str, Any]], shape: str | None, batch_size: int | None, path: Path) -> dict[str, float]:
    """Each format's speed in units of the first one's, by paired ratios."""
    measured = sorted({(row["shape"], row["batch_size"]) for row in rows})
    chosen = [pair for pair in measured if shape in (None, pair[0]) and batch_size in (None, pair[1])]
    if len(chosen) != 1:
        has = ", ".join(f"{name} at batch size {size}" for name, size in measured)
        asked = f"--shape {shape} --batch-size {batch_size}"
        raise ValueError(f"{asked} fit {len(chosen)} measurements of {path}, which has {has}; name one")
    wanted = (*chosen[0], rows[0]["baseline"])
    return {row["format"]: row["ratio"] for row in rows if (row["shape"], row["batch_size"], row["baseline"]) == wanted}


def _sync_costs(rows: Sequence[Mapping[str, Any]], transport: str | None, path: Path) -> dict[str, float]:
    """Seconds of an update in each format, in units of full precision, by paired ratios."""
    measured = sorted({row["transport"] for row in rows})
    chosen = [name for name in measured if transport in (None, name)]
    if len(chosen) != 1:
        has = ", ".join(measured)
        raise ValueError(f"--transport {transport} fits {len(chosen)} measurements of {path}, which has {has}; name one")
    return {row["quantization_format"]: row["total_ratio"] for row in rows if row["transport"] == chosen[0]}
