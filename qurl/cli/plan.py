"""`qurl plan`: the tables."""

from __future__ import annotations

import argparse
import dataclasses
import re

from qurl.cli.overrides import add_overrides, validated
from qurl.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Overrides, and GPUs to plan for."""
    parser.add_argument("--gpus", metavar="NxGIB", help="plan for N Hopper GPUs of GIB GiB instead of this machine's, e.g. 8x80")
    add_overrides(parser)


def main(args: argparse.Namespace) -> int:
    """Returns 0. Raises ConfigError for a configuration that cannot run."""
    config = validated(args.overrides)
    from rich.console import Console

    from qurl.hardware import detect
    from qurl.plan import make_plan

    machine = detect()
    if args.gpus:
        machine = dataclasses.replace(machine, gpus=_described(args.gpus))
    plan = make_plan(config, machine)

    from qurl.cli.plan_tables import plan_tables

    console = Console()
    for table in plan_tables(config, plan):
        console.print(table)
    for warning in plan.warnings:
        console.print(f"[yellow]note[/yellow] {warning}", highlight=False)
    return 0


def _described(text: str):
    from qurl.hardware import Gpu

    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ConfigError(f"--gpus {text} is not NxGIB; write for instance --gpus 8x80")
    count, gib = int(match[1]), int(match[2])
    return tuple(Gpu(name=f"{gib} GiB GPU", memory_bytes=gib << 30, capability=(9, 0)) for _ in range(count))
