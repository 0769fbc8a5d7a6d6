"""`qurl quantize`: the options, the progress bars, the tables."""

from __future__ import annotations

import argparse
import asyncio
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qurl.errors import ConfigError

if TYPE_CHECKING:
    from qurl.ptq import QuantizeReport, QuantizeSettings
    from qurl.ptq.evaluation import Text

WORST = 10  # matrices in the table
NUM_CALIBRATION = 16  # documents
WIDTH = 160

EPILOG = """vLLM serves OUT as it is wherever qurl is installed: vllm serve OUT. For a checkpoint that it serves without, use
qurl export, in the formats that compressed-tensors has.
The same command goes on where an earlier one was killed. The error of every matrix is in OUT/report.json.

Examples:
  qurl quantize models/qwen models/qwen-lobcq --format lobcq
  qurl quantize models/qwen models/qwen-lobcq --format lobcq --calibration train.jsonl --per layer --text held_out.jsonl
  qurl quantize runs/gsm8k out --format nvfp4 --ignore down_proj --text held_out.jsonl"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, target, format, calibration, text."""
    from qurl.cli.calibrate import PER
    from qurl.cli.text_options import add_text_options

    parser.add_argument("source", type=Path, metavar="SOURCE", help="a Hugging Face folder or a run folder (its latest checkpoint)")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet, or was begun by the same command")
    parser.add_argument("--format", required=True, help="int8, fp8, fp8_block, int4, nf4, mxfp4, nvfp4, lobcq, ...")
    parser.add_argument("--codebooks", metavar="FILE", help="of the formats of LO-BCQ; default: the package's")
    group = "as quantization.group_size, of --format int4 (128) and nf4 (64)"
    parser.add_argument("--group-size", type=int, default=0, metavar="N", help=group)
    parser.add_argument("--rotation", type=int, default=0, metavar="N", help="as quantization.rotation: 16, 32, 64, 128; default 0")
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="modules to keep as they are; repeatable")
    parser.add_argument("--precision", metavar="SETTING|FILE", help="of --format axbxp: e.g. k4-w1-a2, or what `qurl search` wrote")
    add = parser.add_argument
    add(
        "--calibration", nargs="+", metavar="SOURCE",
        help="text, as for --text, to measure the error of every layer's outputs on, and with --per to find codebooks on",
    )  # fmt: skip
    add("--num-calibration", type=int, default=NUM_CALIBRATION, metavar="N",
        help=f"the first documents of --calibration; default {NUM_CALIBRATION}")  # fmt: skip
    add("--per", choices=PER,
        help="find codebooks of LO-BCQ on --calibration, as `qurl calibrate` does; OUT holds them")  # fmt: skip
    add_text_options(parser, required=False)
    parser.epilog = EPILOG


def main(args: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError for a source that cannot be quantized, or an output that is something else."""
    from qurl.cli.progress import progress_bar
    from qurl.cli.text_options import check_text_options
    from qurl.config.codebooks_file import resolved_codebooks
    from qurl.config.precision_file import resolved_precision
    from qurl.locks import only_writer
    from qurl.ptq import QuantizeSettings, quantize_folder
    from qurl.ptq.evaluation import Text
    from qurl.quantization import FORMATS, resolved_format

    formats = [name for name in FORMATS if name != "none"]
    if args.format not in formats:
        raise ConfigError(f"--format {args.format}: nothing to quantize to; use one of {', '.join(formats)}")
    check_text_options(args)
    _check_calibration(args)
    codebooks = resolved_codebooks(args.codebooks, "--codebooks")
    precision = resolved_precision(args.precision, "--precision")
    with _in_options(args):
        resolved_format(
            args.format, codebooks=codebooks, precision=precision, rotation=args.rotation, group_size=args.group_size
        )
    with only_writer(args.out), _in_options(args), _source(args.source, args.out) as source:
        text = Text(source, args.text, args.max_documents, args.context) if args.text else None
        calibration = _calibration_text(args, source)
        if args.per:
            codebooks = _found_codebooks(args, source)
        settings = QuantizeSettings(
            format=args.format, ignore=tuple(args.ignore), codebooks=codebooks, precision=precision, rotation=args.rotation,
            group_size=args.group_size,
        )
        with progress_bar("tensors") as show:
            report = quantize_folder(source, args.out, settings, show)
        _print_errors(report, {} if calibration is None else _output_errors(calibration, args.out, settings, report))
        if text is not None:
            _measure(text, args.out, settings, report)
    print(args.out)
    return 0


def _calibration_text(args: argparse.Namespace, source: Path) -> Text | None:
    from qurl.ptq.evaluation import Text

    asked = args.calibration
    return Text(source, asked, args.num_calibration, args.context, "--calibration") if asked else None


def _check_calibration(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that contradict each other."""
    from qurl.quantization import FORMATS
    from qurl.quantization.lobcq import LoBcq

    if args.num_calibration < 1:
        raise ConfigError(f"--num-calibration {args.num_calibration} leaves no document; use at least 1")
    if args.per is None:
        return
    format = FORMATS[args.format]
    if not isinstance(format, LoBcq):
        raise ConfigError(f"--per {args.per}: --format {args.format} has no codebooks; leave it out, or use --format lobcq")
    if args.codebooks is not None:
        raise ConfigError(f"--per {args.per} finds codebooks, and --codebooks {args.codebooks} gives some; leave one of them out")
    if format.keeps_activations:
        if args.per.endswith("operand"):
            raise ConfigError(f"--per {args.per}: --format {args.format} leaves activations as they are; use universal or layer")
    elif args.calibration is None:
        raise ConfigError(f"--per {args.per} finds codebooks on text; give it by --calibration")


def _found_codebooks(args: argparse.Namespace, source: Path) -> Any:
    """The content that --codebooks would read from a file; sets are kept beside OUT as they are found."""
    from qurl.cli.calibrate import check_options, find_sets
    from qurl.quantization import FORMATS

    format: Any = FORMATS[args.format]
    text = {"operands": "weights", "text": None} if format.keeps_activations else {"operands": "both", "text": args.calibration}
    options = argparse.Namespace(
        model=source, per=args.per, max_documents=args.num_calibration, context=args.context, rotation=args.rotation,
        ignore=args.ignore, activation_codeword_bits=None, seed=0, **text, **asdict(format.layout),
    )  # fmt: skip
    check_options(options)
    return find_sets(options, args.out.with_name(f"{args.out.name}.codebooks.jsonl")).content


OPTIONS = {
    "quantization.rotation=": "--rotation ", "quantization.group_size=": "--group-size ", "quantization=": "--format ",
}  # fmt: skip
"""Keys of the configuration in errors, and what this command calls them."""


@contextmanager
def _in_options(args: argparse.Namespace) -> Iterator[None]:
    """A ValueError from inside leaves with options of this command in the place of keys of the configuration."""
    codebooks = f"--per {args.per}" if args.per else f"--codebooks {args.codebooks}"
    words = {"quantization.codebooks": codebooks, "quantization.precision": "--precision"}
    try:
        yield
    except ValueError as error:
        message = str(error)
        for key, option in (words | OPTIONS).items():
            message = message.replace(key, option)
        raise ConfigError(message) from error


@contextmanager
def _source(source: Path, out: Path) -> Iterator[Path]:
    """The Hugging Face folder; of a run, its checkpoint, exported beside OUT and kept where the process is interrupted."""
    if not (source / "config.yaml").is_file():
        yield source
        return
    from qurl.trainer.export import export_run, latest_checkpoint

    exported = out.with_name(f".{out.name}.{latest_checkpoint(source).resolve().name}")
    if not exported.is_dir():
        partial = exported.with_name(exported.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        asyncio.run(export_run(source, partial))
        partial.replace(exported)
    try:
        yield exported
    except ValueError:
        shutil.rmtree(exported)
        raise
    shutil.rmtree(exported)


def _measure(text: Text, out: Path, settings: QuantizeSettings, report: QuantizeReport) -> None:
    """Perplexity before and after, into the table and report.json."""
    from qurl.cli.progress import progress_bar
    from qurl.ptq import divergence, increase, perplexity
    from qurl.ptq.checkpoint import add_to_report
    from qurl.ptq.evaluation import quantized_on_disk

    modules = [matrix.module for matrix in report.matrices]
    replacements: dict[str, Any] = {
        "none": None, settings.format: quantized_on_disk(out, settings.quantization(modules), modules)
    }  # fmt: skip
    losses = {}
    for name, replace in replacements.items():
        with progress_bar(f"documents, {name}", len(text.documents)) as show:
            question = {"format": name, "settings": report.settings} if name != "none" else {"format": name}
            path = out / "perplexity" / f"{name}.jsonl"
            losses[name] = text.losses(path, question, replace, show)
    before, after = (perplexity(found) for found in losses.values())
    change = increase(losses[settings.format], losses["none"])
    print(f"perplexity {before.value:.4f} -> {after.value:.4f}, increase {change:.4f} (standard error over documents); "
          f"{len(text.documents)} documents, {text.num_tokens} predicted tokens")  # fmt: skip
    found = {
        "text": text.sources, "documents": len(text.documents), "tokens": text.num_tokens, "context": text.context,
        "before": before.value, "after": after.value, "increase": change.value, "increase_standard_error": change.standard_error,
        "divergence": divergence(losses[settings.format]).value,
    }  # fmt: skip
    add_to_report(out, perplexity=found)


def _output_errors(text: Text, out: Path, settings: QuantizeSettings, report: QuantizeReport) -> dict[str, float]:
    """Of each module, on `text`; into report.json too."""
    from qurl.cli.progress import progress_bar
    from qurl.ptq.checkpoint import add_to_report
    from qurl.ptq.evaluation import quantized_on_disk
    from qurl.ptq.output_error import output_errors

    modules = [matrix.module for matrix in report.matrices]
    replace = quantized_on_disk(out, settings.quantization(modules), modules)
    with progress_bar("layers, outputs", len(modules)) as show:
        found = output_errors(text.model, text, replace, modules, show)
    add_to_report(out, calibration={"text": text.sources, "documents": len(text.documents), "output_nmse": found})
    return found


def _print_errors(report: QuantizeReport, output_nmse: Mapping[str, float]) -> None:
    """The worst matrices; with output_nmse, the error of outputs by module, by that."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, title=f"worst of {len(report.matrices)} matrices", title_justify="left")
    for column in ("module", "shape", "SQNR dB", "relative error", *(["output NMSE"] if output_nmse else [])):
        table.add_column(column, no_wrap=True)
    for matrix in sorted(report.matrices, key=lambda each: -output_nmse.get(each.module, 0.0))[:WORST]:
        sqnr = "exact" if matrix.sqnr_db is None else f"{matrix.sqnr_db:.2f}"
        outputs = [f"{output_nmse[matrix.module]:.5f}"] if output_nmse else []
        table.add_row(matrix.module, " x ".join(map(str, matrix.shape)), sqnr, f"{matrix.relative_error:.4f}", *outputs)
    Console(width=WIDTH).print(table)
    saved = report.source_bytes / report.checkpoint_bytes
    print(f"bits per weight: {report.bits_formula:.4f} by formula, {report.bits_on_disk:.4f} on disk; the checkpoint has "
          f"{report.checkpoint_bytes / 1e6:.1f} MB, its source {saved:.2f} times that")  # fmt: skip
