"""`qurl bench perplexity`: the options, the progress bars, the table."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qurl.cli.tables import print_table
from qurl.errors import ConfigError

if TYPE_CHECKING:
    from qurl.bench.perplexity import PerplexityRow, Unmeasured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, text, formats, folder."""
    from qurl.cli.text_options import add_text_options

    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder")
    add_text_options(parser, required=True)
    formats = (
        "int8, nvfp4, lobcq, lobcq:CODEBOOKS, axbxp:k4-w1-a2, axbxp:FILE of `qurl search`, int4:64 with a group size, lobcq@16 and "
        "the like with a rotation, ...; none comes first"
    )
    parser.add_argument("--formats", nargs="+", required=True, metavar="FORMAT", help=formats)
    parser.add_argument("--operands", default="both", choices=("both", "weights", "activations"), help="what is quantized")
    parser.add_argument("--relative-to", metavar="FORMAT", help="also print each increase over that of this format")
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="modules to keep as they are; repeatable")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="losses per document; a killed command goes on")


def main(args: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError for a folder, text or format that cannot be used."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from qurl.bench.perplexity import Operands, PerplexityRow, run_perplexity_bench
    from qurl.cli.text_options import check_text_options
    from qurl.locks import only_writer
    from qurl.ptq.evaluation import Text

    check_text_options(args)
    if not (args.model / "config.json").is_file():
        raise ConfigError(f"{args.model} is no Hugging Face folder; of a run, make one with `qurl export`")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    found: list[PerplexityRow] = []
    with only_writer(args.out), sigterm_as_interrupt():
        try:
            with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
                text = Text(args.model, args.text, args.max_documents, args.context)
                tasks: dict[str, Any] = {}

                def show(format: str, done: int, total: int) -> None:
                    if format not in tasks:
                        tasks[format] = bar.add_task(format, total=total)
                    bar.update(tasks[format], completed=done)

                def finished(row: PerplexityRow | Unmeasured) -> None:
                    if row.format in tasks:
                        bar.remove_task(tasks.pop(row.format))
                    if isinstance(row, PerplexityRow):
                        found.append(row)
                    bar.console.print(_line(row), markup=False, highlight=False, soft_wrap=True)

                found = run_perplexity_bench(
                    args.model, text, args.formats, args.out, operands=Operands(args.operands), relative_to=args.relative_to,
                    ignore=args.ignore, progress=show, finished=finished,
                )  # fmt: skip
        finally:  # an interrupted command prints what it has
            if found:
                print(f"{len(text.documents)} documents, {text.num_tokens} predicted tokens, at most {text.context} at a time")
                _print(found, args.relative_to)
    return 0


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends what is inside as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _line(row: PerplexityRow | Unmeasured) -> str:
    """A format that has come to its end."""
    from qurl.bench.perplexity import Unmeasured

    if isinstance(row, Unmeasured):
        return f"{row.format}: left out: {row.reason}"
    increase = f"increase {row.increase:.3f} +- {row.standard_error:.3f}"
    return f"{row.format}: {row.bits_per_weight:.3f} bits, perplexity {row.perplexity:.3f}, {increase}"


def _print(rows: Sequence[PerplexityRow], relative_to: str | None) -> None:
    columns = ["format", "bits", "NMSE weights", "NMSE activations", "perplexity", "increase", "divergence"]
    columns += [f"increase / {relative_to}'s", f"divergence / {relative_to}'s"] if relative_to else []
    lines = []
    for row in rows:
        cells = [
            row.format, f"{row.bits_per_weight:.3f}", f"{100 * row.weight_nmse:.4f} %", f"{100 * row.activation_nmse:.4f} %",
            f"{row.perplexity:.3f}", f"{row.increase:.3f} +- {row.standard_error:.3f}", f"{row.divergence:.6f}",
        ]  # fmt: skip
        ratios = (row.increase_ratio, row.divergence_ratio) if relative_to else ()
        cells += ["-" if ratio is None else f"{ratio.value:.3f} +- {ratio.standard_error:.3f}" for ratio in ratios]
        lines.append(cells)
    print_table(columns, lines, ("format",))
