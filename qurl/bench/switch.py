"""How long a live engine takes to change the precision of Ax-BxP.

One engine, as rollout workers have it, goes around the precisions for several rounds. A switch is everything until it may sample
again: codes without the dropped blocks for every layer, and an empty prefix cache. After each, tokens and log-probabilities of a
sample are compared with those of an engine that was started with the precision, and must be the same numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qurl.bench.child import Progress, check_known, measure_in_child
from qurl.bench.rollout_shapes import SHAPES, linear_layers
from qurl.quantization.axbxp import parse

PRECISIONS = ("k2-w4-a4", "k2-w2g16-a3g1", "k4-w1-a2", "k1-w3g16-a3g1", "k4-w2-a2-noll")


@dataclass(frozen=True, kw_only=True, slots=True)
class SwitchRow:
    """Switches to one precision, at one shape."""

    time_ms: float  # of a switch, median over rounds
    time_ms_min: float
    time_ms_max: float
    precision: str
    shape: str
    num_weights: int  # of the linear layers
    num_threads: int
    equals_started: bool | None  # the engine computes what one started with the precision does; None: not compared


def run_switch_bench(
    shapes: Sequence[str] = ("0.4b",),
    precisions: Sequence[str] = PRECISIONS,
    *,
    num_rounds: int = 5,
    num_threads: int | None = None,
    compare: bool = True,
    progress: Progress = lambda shape, done, total: None,
) -> list[SwitchRow]:
    """A row for every shape and precision. num_threads: of the engine; default all cores. compare: with engines that are started
    for that, one for each precision.

    Raises ValueError for a shape or precision that does not exist, fewer than two precisions and fewer than one round, and
    RuntimeError with the end of the child's output where measuring failed."""
    check_known("shape", shapes, list(SHAPES))
    settings = list(dict.fromkeys(str(parse(precision)) for precision in precisions))
    if len(settings) < 2 or num_rounds < 1:
        raise ValueError(f"{len(settings)} precisions and {num_rounds} rounds: a switch needs at least 2 and 1")
    rows = []
    for shape in shapes:
        job = {"shape": shape, "precisions": settings, "num_rounds": num_rounds, "compare": compare}
        found = measure_in_child("qurl.bench.switch_child", job, num_threads, progress)
        rows += _rows(shape, found["num_threads"], found["seconds"], found["equal"])
    return rows


def _rows(
    shape: str, num_threads: int, seconds: Mapping[str, Sequence[float]], equal: Mapping[str, Sequence[bool]]
) -> list[SwitchRow]:
    """seconds, equal: of each round, by precision; the latter without entries where nothing was compared."""
    num_weights = sum(map(math.prod, linear_layers(shape)))
    return [
        SwitchRow(
            time_ms=1e3 * statistics.median(times), time_ms_min=1e3 * min(times), time_ms_max=1e3 * max(times), precision=name,
            shape=shape, num_weights=num_weights, num_threads=num_threads,
            equals_started=all(equal[name]) if equal.get(name) else None,
        )
        for name, times in seconds.items()
    ]  # fmt: skip
