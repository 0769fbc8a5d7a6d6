"""`qurl report RUN...`: the HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Run folders and the page."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, e.g. runs/quickstart")
    parser.add_argument("--out", type=Path, help="the page; default: report.html in the first run folder")
    parser.epilog = "Examples:\n  qurl report runs/quickstart\n  qurl report runs/bf16 runs/int8 runs/fp8 --out compare.html"


def main(args: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError for a folder without a run in it."""
    from qurl.observability.report import write_report

    out = args.out or args.runs[0] / "report.html"
    write_report(args.runs, out)
    print(out)
    return 0
