"""`qurl train`: check everything that can be checked, then run."""

from __future__ import annotations

import argparse
import sys

from qurl.cli.overrides import add_overrides, validated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Overrides only; everything else is configuration."""
    add_overrides(parser)


def main(args: argparse.Namespace) -> int:
    """Returns the run's exit code. Raises ConfigError before Ray, vLLM or DeepSpeed are imported."""
    config = validated(args.overrides)
    from qurl.plan import make_plan

    for warning in make_plan(config).warnings:
        print(f"note: {warning}", file=sys.stderr)

    from qurl.trainer.run import run

    return run(config)
