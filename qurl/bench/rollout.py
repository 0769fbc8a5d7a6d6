"""How fast engines decode in each format, measured in pairs.

Engines are vLLM's LLMEngine inside the measuring process (VLLM_ENABLE_V1_MULTIPROCESSING=0), because that is how qurl's rollout
workers run them: no process boundary hides or adds time, a step is a call that can be timed, and several engines can take turns.
Absolute speed on a shared machine moves by more than the formats differ, so all engines of a shape live side by side and decode a
few steps each in turn, in alternating order; a ratio is taken within one round and the median over rounds is reported.

A format is measured in the dtype that rollout.dtype=auto takes here, or in the one behind an `@`, as in `none@bfloat16`. `none` is
that dtype, `int8` and its like are qurl's methods, `stock_int8` is vLLM's own method on a checkpoint exported for it.
Only decoding is timed, with the sampling of training: temperature 1, log-probabilities, one seed per request.

A step reads the weights of all linear layers, as they lie in memory, and of lm_head; keys and values are not counted, which short
requests have few of. How fast the same threads (or a GPU) read memory is measured between the turns of the engines:
`bandwidth_share` says how much of that a step used. Where that cannot be measured there is no share, and none where the cache
holds all that a step reads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from qurl.bench.child import Progress, check_known, measure_in_child
from qurl.bench.rollout_shapes import DTYPE_BYTES, SHAPES, head_bytes, linear_layers
from qurl.quantization import FORMATS

STOCK = "stock_"
"""Prefix of formats that run on vLLM's own method."""

DTYPE = "@"
"""Stands between a format and a dtype."""

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
    bytes_per_weight: float  # of the linear layers, in memory
    bandwidth_share: float | None  # of a step's reading, over what can be read; None: not measured, or from the cache


def run_rollout_bench(
    shapes: Sequence[str] = ("0.4b",),
    formats: Sequence[str] = ("none", "int8", "stock_int8"),
    batch_sizes: Sequence[int] = (1, 16, 64),
    *,
    num_rounds: int = 9,
    steps_per_round: int = 8,
    num_threads: int | None = None,
    enforce_eager: bool | None = None,
    progress: Progress = lambda shape, done, total: None,
) -> list[RolloutRow]:
    """Rows for every shape and batch size: each format over the first one, and a qurl format over its stock counterpart.

    num_threads: of the engines; default all cores. enforce_eager: no CUDA graphs; default as in training, on CPUs alone. Raises
    ValueError for an unknown shape, format or dtype or a count below 1, and RuntimeError with the end of the child's output where
    measuring failed."""
    _check(shapes, formats, batch_sizes, num_rounds, steps_per_round)
    rows = []
    for shape in shapes:
        job = {
            "shape": shape, "formats": list(formats), "batch_sizes": list(batch_sizes), "num_rounds": num_rounds,
            "steps_per_round": steps_per_round, "enforce_eager": enforce_eager,
        }  # fmt: skip
        found = measure_in_child("qurl.bench.rollout_child", job, num_threads, progress)
        held = {
            name: found["linear_bytes"].get(name) or _stored_bytes(shape, name, found["dtypes"][name]) for name in formats
        }
        for batch_size, measured in zip(batch_sizes, found["measured"], strict=True):
            limit = max(measured["read_bytes_per_s"], default=None)
            cache_bytes, dtypes = found["cache_bytes"], found["dtypes"]
            rows += _rows(shape, batch_size, steps_per_round, measured["seconds"], held, limit, cache_bytes, dtypes)
    return rows


def _rows(
    shape: str, batch_size: int, steps: int, seconds: Mapping[str, list[float]], held: Mapping[str, float], limit: float | None,
    cache_bytes: int, dtypes: Mapping[str, str] = MappingProxyType({}),
) -> list[RolloutRow]:  # fmt: skip
    """seconds: of each round, by format; held: bytes of the linear layers, likewise; limit: bytes that can be read in a second.
    dtypes: of what a format does not quantize, lm_head too; bfloat16 where none is named."""
    num_weights = sum(map(math.prod, linear_layers(shape)))
    first = next(iter(seconds))
    pairs = [(name, first) for name in seconds]
    pairs += [(name, PAIRS_WITH_STOCK[name]) for name in seconds if PAIRS_WITH_STOCK.get(name, first) in seconds.keys() - {first}]
    rows = []
    for name, baseline in pairs:
        ratios = [base / own for base, own in zip(seconds[baseline], seconds[name], strict=True)]
        step_s, step_bytes = statistics.median(seconds[name]) / steps, held[name] + head_bytes(shape, dtypes.get(name, "bfloat16"))
        share = None if limit is None or step_bytes <= cache_bytes else step_bytes / step_s / limit
        rows.append(RolloutRow(
            ratio=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios), format=name, baseline=baseline,
            shape=shape, batch_size=batch_size, tokens_per_s=batch_size / step_s, bytes_per_weight=held[name] / num_weights,
            bandwidth_share=share,
        ))  # fmt: skip
    return rows


def _stored_bytes(shape: str, name: str, dtype: str) -> float:
    """Of the linear layers in their dtype or in vLLM's own format, which it holds as they are stored."""
    name = name.partition(DTYPE)[0]
    if name == "none":
        return sum(DTYPE_BYTES[dtype] * math.prod(layer) for layer in linear_layers(shape))
    format = FORMATS[name.removeprefix(STOCK)]
    return sum(format.bits_per_weight(layer) / 8 * math.prod(layer) for layer in linear_layers(shape))


def _check(shapes: Sequence[str], formats: Sequence[str], batch_sizes: Sequence[int], *counts: int) -> None:
    known = [*FORMATS, *PAIRS_WITH_STOCK.values()]
    check_known("shape", shapes, list(SHAPES))
    check_known("format", [name.partition(DTYPE)[0] for name in formats], known)
    check_known("dtype", [name.partition(DTYPE)[2] or "bfloat16" for name in formats], list(DTYPE_BYTES))
    if len(set(formats)) < len(formats):
        raise ValueError(f"formats {list(formats)} name one twice")
    if not batch_sizes or min(*batch_sizes, *counts) < 1:
        raise ValueError(f"batch sizes {list(batch_sizes)}, rounds and steps {list(counts)} must be at least 1")
