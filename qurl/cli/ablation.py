"""`qurl ablation`: the options and the progress bar."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qurl.cli.overrides import add_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe as overrides, and what is compared."""
    from qurl.ablation.trials import ARMS

    add_overrides(parser)
    add = parser.add_argument
    add("--formats", nargs="+", default=["int8", "mxfp4"], metavar="NAME", help="of the rollouts; default: int8 mxfp4")
    add("--arms", nargs="+", default=list(ARMS), metavar="NAME", help="default: all, see below")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="of the runs; default: 0 1 2")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    add("--out", type=Path, default=Path("runs/ablation"), metavar="DIR", help="default: runs/ablation")
    listing = "\n".join(f"  {name:14}{arm.what}" for name, arm in ARMS.items())
    parser.epilog = f"""Arms:
{listing}

The page is index.html in --out. The same command goes on where an earlier one was ended.

Examples:
  qurl ablation recipe=ablation --jobs 2
  qurl ablation recipe=ablation --arms tis acr --formats int8 --seeds 0 1 2 3 4"""


def main(args: argparse.Namespace) -> int:
    """Returns 0. Raises ConfigError before anything starts."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from qurl.ablation.ablate import Ablation, run_ablation

    ablation = Ablation(
        overrides=args.overrides, out=args.out, formats=args.formats, arms=args.arms, seeds=args.seeds, num_jobs=args.jobs
    )
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("eta"),
        TimeRemainingColumn(), console=Console(file=sys.stderr),
    )  # fmt: skip
    task = bar.add_task("train")

    def progress(what: str, done: int, total: int) -> None:
        bar.start()  # only now: what is refused before is one line of its own
        bar.update(task, description=what, completed=done, total=total)
        if not bar.console.is_terminal:
            print(f"{what}: {done} of {total} runs", file=sys.stderr, flush=True)

    try:
        path = run_ablation(ablation, progress)
    finally:
        if bar.live.is_started:
            bar.stop()
    print(path)
    return 0
