"""`qurl search`: the options, the progress bars, the table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qurl.errors import ConfigError

if TYPE_CHECKING:
    from qurl.ptq.precision_search import SearchReport

MAX_LOSS, NUM_CALIBRATION, NUM_CONFIRMATION = 0.01, 16, 16
WIDTH = 160

EPILOG = """The search runs on the first documents of the text; the next decide which of what it found stands; the others make the
table, and have no say. Other commands take OUT/precision.yaml as it is. The same command goes on where an earlier one was killed;
with more --max-documents the table grows more exact.

Examples:
  qurl search models/qwen found --text held_out.jsonl --max-documents 100
  qurl quantize models/qwen out --format axbxp --precision found/precision.yaml
  qurl bench perplexity models/qwen --text other.jsonl --formats int8 axbxp:k2-w2g16-a3g1 axbxp:found/precision.yaml --out table
  qurl train recipe=quickstart quantization=axbxp quantization.precision=found/precision.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, folder, text, bound, candidates."""
    from qurl.cli.text_options import add_text_options

    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet, or was begun by the same command")
    add_text_options(parser, required=True)
    add = parser.add_argument
    add("--max-loss", type=float, default=MAX_LOSS, metavar="SHARE",
        help=f"relative increase in perplexity that is accepted; default {MAX_LOSS:g}")  # fmt: skip
    add("--num-calibration", type=int, default=NUM_CALIBRATION, metavar="N",
        help=f"documents for the search; default {NUM_CALIBRATION}")  # fmt: skip
    add("--num-confirmation", type=int, default=NUM_CONFIRMATION, metavar="N",
        help=f"documents for its confirmation, by a standard error; default {NUM_CONFIRMATION}")  # fmt: skip
    add("--candidates", nargs="+", metavar="SETTING", help="of the whole network; default: ten from k2-w4-a4 to k1-w3g16-a3g1")
    add("--ignore", action="append", default=[], metavar="PATTERN", help="modules to keep as they are; repeatable")
    parser.epilog = EPILOG


def main(args: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError for a model, text, setting or bound that cannot be searched with, or met."""
    from qurl.cli.progress import progress_bar
    from qurl.cli.text_options import check_text_options
    from qurl.locks import only_writer
    from qurl.ptq.evaluation import Text
    from qurl.ptq.precision_search import CANDIDATES, PRECISION, SearchSettings, search_precision
    from qurl.quantization.axbxp import parse

    check_text_options(args)
    if not args.max_loss > 0:
        raise ConfigError(f"--max-loss {args.max_loss:g} is met by full precision alone; use a number above 0, e.g. {MAX_LOSS:g}")
    if args.num_calibration < 1:
        raise ConfigError(f"--num-calibration {args.num_calibration} leaves no document to search with; use at least 1")
    if args.num_confirmation < 2:
        raise ConfigError(f"--num-confirmation {args.num_confirmation} is too few for a standard error; use at least 2")
    candidates = tuple(str(_parsed(candidate, parse)) for candidate in args.candidates or CANDIDATES)
    if not (args.model / "config.json").is_file():
        raise ConfigError(f"{args.model} is no Hugging Face folder; of a run, make one with `qurl export`")
    settings = SearchSettings(
        max_loss=args.max_loss, num_calibration=args.num_calibration, num_confirmation=args.num_confirmation,
        candidates=tuple(dict.fromkeys(candidates)), ignore=tuple(args.ignore),
    )  # fmt: skip
    with only_writer(args.out), progress_bar("precisions, calibration") as show:
        text = Text(args.model, args.text, args.max_documents, args.context)
        report = search_precision(args.model, text, args.out, settings, lambda what, done, total: show(done, total, what))
    num_test = len(text.documents) - args.num_calibration - args.num_confirmation
    print(f"searched on {args.num_calibration} documents, {report.num_measured} precisions; confirmed on {args.num_confirmation}; "
          f"below, {num_test} others")  # fmt: skip
    _print(report)
    print(f"{args.out / PRECISION}: {report.network}, then {report.rung} cheaper ones, layer by layer; "
          f"{report.num_rungs - report.rung} more met the bound in the search and not in the confirmation")  # fmt: skip
    return 0


def _parsed(candidate: str, parse: Any) -> Any:
    try:
        return parse(candidate)
    except ValueError as error:
        raise ConfigError(str(error).replace("quantization.precision=", "--candidates ")) from error


def _print(report: SearchReport) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    gains = ["energy", "memory bound", "compute bound"]
    columns = ["precision", "bit products", "bits", "perplexity", "increase %", "divergence", *gains]
    caption = f"{', '.join(gains)}: gains over INT8 of a machine that a model of costs imagines, none of them measured"
    table = Table(*columns, box=box.SIMPLE, padding=(0, 1), caption=caption, caption_justify="left")
    for row in report.rows:
        table.add_row(
            row.precision, f"{row.products:.4f}", f"{row.weight_bits:.3f}", f"{row.perplexity:.3f}",
            f"{100 * row.increase:+.2f} +- {100 * row.standard_error:.2f}", f"{row.divergence:.6f}",
            *(f"{gain:.2f}" for gain in (row.energy_gain, row.memory_bound_gain, row.compute_bound_gain)),
        )  # fmt: skip
    Console(width=WIDTH).print(table)
