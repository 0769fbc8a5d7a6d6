"""The processor time of one weight update inside an engine, whatever its bytes.

Models have Qwen2's layers and next to no width, so that what is left is Python: fingerprints of small tensors, vLLM's loaders, and
making each layer live. That grows with the number of tensors and not with their size; the bytes themselves are `qurl bench sync`'s.
Processor time of the whole process is counted, with one thread, so that a busy machine changes little."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qurl.bench.child import Progress, check_known, measure_in_child
from qurl.quantization import FORMATS


@dataclass(frozen=True, kw_only=True, slots=True)
class InstallRow:
    """Updates of one engine."""

    cpu_s: float  # of one update from begin to commit, verification included; median over rounds
    cpu_s_min: float
    cpu_s_max: float
    load_cpu_s: float  # the part that puts tensors into the model, without verification; median
    num_layers: int
    format: str
    num_tensors: int  # on the wire
    num_buckets: int


def run_install_bench(
    layers: Sequence[int] = (28, 64),
    formats: Sequence[str] = ("int8",),
    *,
    num_rounds: int = 5,
    tensors_per_bucket: int = 0,
    progress: Progress = lambda shape, done, total: None,
) -> list[InstallRow]:
    """A row for every number of layers and format. tensors_per_bucket: 0 puts a whole update into one bucket.

    Raises ValueError for an unknown format or a count below 1, and RuntimeError with the end of the child's output where measuring
    failed."""
    check_known("format", formats, list(FORMATS))
    if not layers or min(*layers, num_rounds) < 1 or tensors_per_bucket < 0:
        raise ValueError(f"layers {list(layers)} and rounds {num_rounds} must be at least 1, tensors in a bucket at least 0")
    rows = []
    for num_layers in layers:
        for format in formats:
            job = {
                "shape": f"{num_layers} layers", "num_layers": num_layers, "format": format, "num_rounds": num_rounds,
                "tensors_per_bucket": tensors_per_bucket,
            }  # fmt: skip
            rows.append(_row(num_layers, format, measure_in_child("qurl.bench.install_child", job, 1, progress)))
    return rows


def _row(num_layers: int, format: str, found: dict[str, list[float]]) -> InstallRow:
    """found: seconds of each round in all, and in the installer; and what was sent."""
    total = found["cpu_s"]
    return InstallRow(
        cpu_s=statistics.median(total),
        cpu_s_min=min(total),
        cpu_s_max=max(total),
        load_cpu_s=statistics.median(found["load_cpu_s"]),
        num_layers=num_layers,
        format=format,
        num_tensors=int(found["num_tensors"][0]),
        num_buckets=int(found["num_buckets"][0]),
    )
