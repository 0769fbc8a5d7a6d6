"""`qurl bench rollout|kernels|switch|sync|install|perplexity|break-even`: run a benchmark and print its rows."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qurl.cli import perplexity_table
from qurl.cli.progress import progress_bar
from qurl.cli.tables import print_table
from qurl.hardware import num_cores

KEYS = (
    "format", "quantization format", "baseline", "shape", "batch size", "matrix", "num tokens", "transport", "precision",
    "num layers",
)  # fmt: skip
"""Columns that say what a row is of."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand per benchmark; options left out take the benchmark's own defaults."""
    parser.epilog = (
        "Examples:\n  qurl bench rollout --formats none int8 --batch-sizes 1 16\n  qurl bench kernels --shapes 4096x4096\n"
        "  qurl bench sync --formats int8\n"
        "  qurl bench perplexity models/qwen --text held_out.jsonl --formats int8 nvfp4 lobcq --relative-to nvfp4"
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    rollout = benchmarks.add_parser("rollout", help="decoding speed of each format, paired with full precision")
    rollout.add_argument("--steps-per-round", type=int, metavar="N", help="decode steps of an engine before the next one's turn")
    kernels = benchmarks.add_parser("kernels", help="speed of each format's matrix products on the CPU, paired with bfloat16")
    switch = benchmarks.add_parser("switch", help="what changing Ax-BxP's precision on a live engine takes")
    switch.add_argument("--precisions", nargs="+", metavar="SETTING", help="that the engine goes around; at least two")
    switch.add_argument("--compare", action=argparse.BooleanOptionalAction, help="with an engine started with each; default: yes")
    for command in (rollout, kernels):
        command.add_argument("--batch-sizes", nargs="+", type=int, metavar="N")
    for command, shape in ((rollout, "SHAPE"), (kernels, "SHAPE|OUTPUTSxINPUTS"), (switch, "SHAPE")):
        command.add_argument("--shapes", nargs="+", metavar=shape)
        command.add_argument("--num-threads", type=int, metavar="N", help="of an engine; default: all cores")
    sync = benchmarks.add_parser("sync", help="encoding and transfer time of a weight update")
    sync.add_argument("--transports", nargs="+", metavar="TRANSPORT")
    install = benchmarks.add_parser("install", help="processor time that an engine takes to install a weight update, by layers")
    install.add_argument("--layers", nargs="+", type=int, metavar="N", help="of narrow models; default: 28 64")
    install.add_argument("--tensors-per-bucket", type=int, metavar="N", help="0, the default: the whole update is one bucket")
    perplexity = benchmarks.add_parser("perplexity", help="what formats do to the perplexity of a model on held-out text")
    perplexity_table.add_arguments(perplexity)
    even = benchmarks.add_parser("break-even", help="whether a format pays in the iterations of a run, by rollout and sync")
    even.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    for other in ("rollout", "sync"):
        even.add_argument(f"--{other}", type=Path, required=True, metavar="FILE", help=f"what `qurl bench {other} --json` wrote")
    even.add_argument("--shape", metavar="SHAPE", help="of the rollout benchmark, where it measured several")
    even.add_argument("--batch-size", type=int, metavar="N", help="likewise")
    even.add_argument("--transport", metavar="TRANSPORT", help="of the sync benchmark, where it measured several")
    for command in (rollout, kernels, sync, install):
        help_ = "none, int8, fp8, mxfp4, ...; rollout: stock_int8, FORMAT@DTYPE; kernels: onednn_int8, lobcq:CODEBOOKS and lobcq@16"
        command.add_argument("--formats", nargs="+", metavar="FORMAT", help=help_)
        command.add_argument("--num-rounds", type=int, metavar="N", help="turns of every format; a ratio is the median over rounds")
    switch.add_argument("--num-rounds", type=int, metavar="N", help="switches to each precision; a time is the median over rounds")
    for command in (rollout, kernels, switch, sync, install, even):
        command.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")


def main(args: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError for a shape, format, transport or text that does not exist."""
    if args.benchmark == "perplexity":
        return perplexity_table.main(args)
    options = {k: v for k, v in vars(args).items() if k not in ("command", "benchmark", "json") and v is not None}
    benchmarks = {"rollout": _rollout_rows, "kernels": _kernel_rows, "switch": _switch_rows, "sync": _sync_rows}
    benchmarks["install"] = _install_rows
    benchmarks["break-even"] = _break_even_rows
    load = busy_load()
    rows = benchmarks[args.benchmark](options)
    _print(rows)
    if load:
        print(f"note: the machine was busy before the start (load {load:.1f} on {num_cores()} cores); times may be too long")
        rows = [row | {"load_before": load, "num_cores": num_cores()} for row in rows]
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


def _rollout_rows(options: dict[str, Any]) -> list[dict[str, Any]]:
    from qurl.bench.rollout import run_rollout_bench

    with progress_bar("starting engines") as show:
        rows = run_rollout_bench(**options, progress=lambda shape, done, total: show(done, total, f"decoding, {shape}, rounds"))
    return [dataclasses.asdict(row) for row in rows]


def _switch_rows(options: dict[str, Any]) -> list[dict[str, Any]]:
    from qurl.bench.switch import run_switch_bench

    with progress_bar("starting engines") as show:
        rows = run_switch_bench(**options, progress=lambda shape, done, total: show(done, total, f"switching, {shape}, rounds"))
    return [dataclasses.asdict(row) for row in rows]


def _kernel_rows(options: dict[str, Any]) -> list[dict[str, Any]]:
    from qurl.bench.kernels import run_kernel_bench

    return [dataclasses.asdict(row) for row in run_kernel_bench(**options)]


def _sync_rows(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The weight stream runs between Ray actors, so a local Ray is started around it."""
    import ray

    from qurl.bench.sync import run_sync_bench

    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves its processes beside anything else
    ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
    try:
        return [dataclasses.asdict(row) for row in run_sync_bench(**options)]
    finally:
        ray.shutdown()


def _install_rows(options: dict[str, Any]) -> list[dict[str, Any]]:
    from qurl.bench.install import run_install_bench

    with progress_bar("starting engines") as show:
        rows = run_install_bench(**options, progress=lambda model, done, total: show(done, total, f"updates, {model}"))
    return [dataclasses.asdict(row) for row in rows]


def _break_even_rows(options: dict[str, Any]) -> list[dict[str, Any]]:
    from qurl.bench.break_even import run_break_even

    return [dataclasses.asdict(row) for row in run_break_even(**options)]


def busy_load() -> float | None:
    """The load of the last minute where it is more than there are cores; None where the machine has room."""
    load = os.getloadavg()[0]
    return load if load > num_cores() else None


def _print(rows: Sequence[dict[str, Any]]) -> None:
    columns = [column.replace("_per_", "/").replace("_", " ") for column in rows[0]]
    print_table(columns, [[_cell(value) for value in row.values()] for row in rows], KEYS)


def _cell(value: Any) -> str:
    """A number, "-" where there is none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
