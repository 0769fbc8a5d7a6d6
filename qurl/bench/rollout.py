"""How fast engines decode in each format, measured in pairs.

Engines are vLLM's LLMEngine inside the measuring process (VLLM_ENABLE_V1_MULTIPROCESSING=0), because that is how qurl's rollout
workers run them: no process boundary hides or adds time, a step is a call that can be timed, and several engines can take turns.
Absolute speed on a shared machine moves by more than the formats differ, so all engines of a shape live side by side and decode a
few steps each in turn, in alternating order; a ratio is taken within one round and the median over rounds is reported.

`none` is bfloat16, `int8` and its like are qurl's methods, `stock_int8` is vLLM's own method on a checkpoint exported for it.
Only decoding is timed, with the sampling of training: temperature 1, log-probabilities, one seed per request.

The measuring process is a child: OpenMP reads its settings when a process starts, and vLLM changes its host process for good."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qurl.bench.rollout_shapes import SHAPES
from qurl.quantization import FORMATS

STOCK = "stock_"
"""Prefix of formats that run on vLLM's own method."""

PROGRESS = "qurl-bench-progress"
"""Begins a line of the child's output that says how many rounds of how many are done."""

Progress = Callable[[str, int, int], None]
"""Called with shape, rounds done, rounds in all."""

PAIRS_WITH_STOCK = {name: STOCK + name for name, quantization in FORMATS.items() if quantization.scheme is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRow:
    """One format against another, at one shape and batch size."""

    ratio: float  # speed over that of `baseline`, median over rounds
    ratio_min: float
    ratio_max: float
    format: str
    baseline: str
    shape: str
    batch_size: int
    tokens_per_s: float  # median over rounds
    bytes_per_weight: float  # of the linear layers


def run_rollout_bench(
    shapes: Sequence[str] = ("0.4b",),
    formats: Sequence[str] = ("none", "int8", "stock_int8"),
    batch_sizes: Sequence[int] = (1, 16, 64),
    *,
    num_rounds: int = 9,
    steps_per_round: int = 8,
    num_threads: int | None = None,
    enforce_eager: bool = True,
    progress: Progress = lambda shape, done, total: None,
) -> list[RolloutRow]:
    """Rows for every shape and batch size: each format over the first one, and a qurl format over its stock counterpart.

    num_threads: of the engines; default all cores. Raises ValueError for an unknown shape or format or a count below 1, and
    RuntimeError with the end of the child's output where measuring failed."""
    _check(shapes, formats, batch_sizes, num_rounds, steps_per_round)
    rows = []
    for shape in shapes:
        job = {
            "shape": shape, "formats": list(formats), "batch_sizes": list(batch_sizes), "num_rounds": num_rounds,
            "steps_per_round": steps_per_round, "enforce_eager": enforce_eager,
        }  # fmt: skip
        measured = _measure_in_child(job, num_threads or len(os.sched_getaffinity(0)), progress)
        for batch_size, seconds in zip(batch_sizes, measured, strict=True):
            rows += _rows(shape, batch_size, steps_per_round, seconds)
    return rows


def _rows(shape: str, batch_size: int, steps: int, seconds: dict[str, list[float]]) -> list[RolloutRow]:
    """seconds: of each round, by format."""
    first = next(iter(seconds))
    pairs = [(name, first) for name in seconds]
    pairs += [(name, PAIRS_WITH_STOCK[name]) for name in seconds if PAIRS_WITH_STOCK.get(name, first) in seconds.keys() - {first}]
    rows = []
    for name, baseline in pairs:
        ratios = [base / own for base, own in zip(seconds[baseline], seconds[name], strict=True)]
        rows.append(RolloutRow(
            ratio=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios), format=name, baseline=baseline,
            shape=shape, batch_size=batch_size, tokens_per_s=batch_size * steps / statistics.median(seconds[name]),
            bytes_per_weight=_bytes_per_weight(shape, name),
        ))  # fmt: skip
    return rows


def _bytes_per_weight(shape: str, name: str) -> float:
    if name == "none":
        return 2.0
    sizes = SHAPES[shape]
    return FORMATS[name.removeprefix(STOCK)].bits_per_weight((sizes["hidden_size"], sizes["hidden_size"])) / 8


def _measure_in_child(job: dict[str, object], num_threads: int, progress: Progress) -> list[dict[str, list[float]]]:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(num_threads), "GOMP_SPINCOUNT": "1000", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="qurl-bench-") as folder:
        command = [sys.executable, "-m", "qurl.bench.rollout_child", str(os.getpid()), folder, json.dumps(job)]
        log, result = Path(folder) / "stderr.txt", Path(folder) / "seconds.json"
        with log.open("w") as stderr:
            child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith(PROGRESS):
                    done, total = map(int, line.split()[1:])
                    progress(str(job["shape"]), done, total)
        if child.wait() != 0 or not result.exists():
            raise RuntimeError(f"measuring {job['shape']} failed (exit code {child.returncode}): ...{log.read_text()[-2000:]}")
        return json.loads(result.read_text())


def _check(shapes: Sequence[str], formats: Sequence[str], batch_sizes: Sequence[int], *counts: int) -> None:
    known = [*FORMATS, *PAIRS_WITH_STOCK.values()]
    for what, asked, table in (("shape", shapes, list(SHAPES)), ("format", formats, known)):
        unknown = [name for name in asked if name not in table]
        if unknown or not asked:
            raise ValueError(f"{what} {unknown[0] if unknown else '(none)'!r} is unknown; use some of {', '.join(table)}")
    if not batch_sizes or min(*batch_sizes, *counts) < 1:
        raise ValueError(f"batch sizes {list(batch_sizes)}, rounds and steps {list(counts)} must be at least 1")
