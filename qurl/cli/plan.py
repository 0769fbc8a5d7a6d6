"""`qurl plan`: the tables."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import TYPE_CHECKING

from qurl.cli.overrides import add_overrides, validated
from qurl.errors import ConfigError

if TYPE_CHECKING:
    from qurl.config import TrainConfig
    from qurl.hardware import Hardware

USABLE_PERCENT = 99
"""Of a GPU's memory as it is sold: one of 80 GiB has 79.2."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Overrides, and the machine to plan for."""
    parser.add_argument(
        "--gpus", metavar="[NODESx]NxGIB",
        help="plan for nodes of N Hopper GPUs of GIB GiB instead of this machine, e.g. 8x80, or 4x8x80 for four nodes",
    )  # fmt: skip
    parser.add_argument("--host-memory", metavar="GIB", type=int, help="memory of each of those nodes; not judged without")
    add_overrides(parser)


def main(args: argparse.Namespace) -> int:
    """Returns 0. Raises ConfigError for a configuration that cannot run."""
    config = validated(args.overrides)
    from rich.console import Console

    from qurl.hardware import detect
    from qurl.plan import make_plan

    if args.host_memory is not None and (args.host_memory < 1 or not args.gpus):
        raise ConfigError(f"--host-memory {args.host_memory}: write a number of GiB >= 1, together with --gpus")
    plan = make_plan(config, _described(detect(), args.gpus, args.host_memory) if args.gpus else None)

    notes = [*plan.warnings, *_tried(config, is_afar=bool(args.gpus))]

    from qurl.cli.plan_tables import plan_tables

    console = Console()
    for table in plan_tables(config, plan):
        console.print(table)
    for note in notes:
        console.print(f"[yellow]note[/yellow] {note}", highlight=False)
    return 0


def _tried(config: TrainConfig, is_afar: bool) -> list[str]:
    """Read data, template, tokenizer and reward as `qurl train` does before it starts; return notes about what was not tried.

    is_afar: the plan is for another machine, where the model and the hub's data sets may be; what is missing here is noted, not
    refused. A local file that does not exist is refused in any case. Raises ValueError for what cannot be used."""
    from qurl.trainer.prepare import is_bare, not_here, prepare

    if is_bare(config):
        return ["model.path has a config.json alone, so data, template and reward were not tried"]
    if is_afar and (missing := not_here(config)):
        return [f"{missing} is not here, so data, template and reward were not tried"]
    found = prepare(config)
    held_out = sum(map(len, found.evaluation.values()))
    longest = max(len(prompt.token_ids) for prompt in found.prompts)
    read = f"{len(found.prompts)} training prompts of at most {longest} tokens and {held_out} of evaluation"
    return [f"data, template and reward were tried: {read}"]


def _described(this: Hardware, gpus: str, host_memory: int | None) -> Hardware:
    """Nodes with this machine's processor, and the GPUs and memory that were asked for."""
    from qurl.hardware import UNLIMITED, Gpu

    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)x([1-9]\d*)", gpus)
    if match is None:
        raise ConfigError(f"--gpus {gpus} is not NxGIB or NODESxNxGIB; write for instance --gpus 8x80 or --gpus 4x8x80")
    nodes, count, gib = (int(part or 1) for part in match.groups())
    gpu = Gpu(name=f"{gib} GiB GPU", memory_bytes=(gib << 30) * USABLE_PERCENT // 100, capability=(9, 0))
    memory = UNLIMITED if host_memory is None else host_memory << 30
    return dataclasses.replace(this, gpus=(gpu,) * count, num_nodes=nodes, memory_bytes=memory)
