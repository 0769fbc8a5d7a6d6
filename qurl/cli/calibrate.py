"""`qurl calibrate`: codebooks of LO-BCQ for a model, for its layers or operands, or with another layout."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qurl.errors import ConfigError

if TYPE_CHECKING:
    from qurl.ptq.calibration import FoundSet
    from qurl.quantization.lobcq import CodebookSets, Layout

LAYOUT = {
    "block": "L_b, inputs that share a codebook", "array": "L_A, inputs that share a scale", "num_codebooks": "N_c",
    "codeword_bits": "of an entry, 6 for lobcq and lobcq_w4a16, 8 for lobcq_int8",
}  # fmt: skip
"""Fields of qurl.quantization.lobcq.Layout."""

PER = ("universal", "operand", "layer", "layer_operand")
"""Values of qurl.ptq.calibration.Per."""

EPILOG = """FILE is what quantization.codebooks=FILE of a run and --codebooks FILE of qurl quantize and qurl eval take.
The same command goes on where an earlier one was killed.

Examples:
  qurl calibrate models/qwen books.json --text train.jsonl --max-documents 64 --per layer_operand
  qurl calibrate models/qwen books.json --text train.jsonl --max-documents 64 --block 4 --array 32 --num-codebooks 8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, file, text, layout."""
    from qurl.cli.text_options import add_text_options

    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder")
    parser.add_argument("out", type=Path, metavar="FILE", help="JSON; must not exist")
    parser.add_argument("--operands", default="both", choices=("both", "weights", "activations"), help="what to look at")
    parser.add_argument(
        "--per", default="universal", choices=PER, help="what has codebooks of its own; a layer is what engines multiply at once"
    )
    add_text_options(parser, required=False)
    for name, meaning in LAYOUT.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"{meaning}; default: the package's")
    parser.add_argument("--rotation", type=int, default=0, metavar="N", help="look at what quantization.rotation makes; default 0")
    parser.add_argument(
        "--activation-codeword-bits", type=int, metavar="N", help="with codebooks per operand; default: as --codeword-bits"
    )
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="modules to leave out; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.epilog = EPILOG


def main(args: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError for a model or text that cannot be read, or a layout that does not fit."""
    from qurl.cli.text_options import check_text_options
    from qurl.locks import only_writer
    from qurl.quantization.lobcq.codebook_sets import save_codebook_sets

    check_text_options(args)
    check_options(args)
    with only_writer(args.out):
        if args.out.exists():
            raise ConfigError(f"{args.out} exists; name a new file")
        journal = args.out.with_name(args.out.name + ".unfinished")
        save_codebook_sets(find_sets(args, journal), args.out, _command(args))
        journal.unlink()
    print(args.out)
    return 0


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for options that contradict each other, or make no layout."""
    _layouts(args)
    if not (args.model / "config.json").is_file():
        raise ConfigError(f"{args.model} is no Hugging Face folder; of a run, make one with `qurl export`")
    if (args.operands == "weights") != (args.text is None):
        told = "needs --text, which makes the activations; or use --operands weights" if args.text is None else "reads no --text"
        raise ConfigError(f"--operands {args.operands} {told}")
    is_of_operands = args.per.endswith("operand")
    if is_of_operands and args.operands != "both":
        raise ConfigError(f"--per {args.per} is for both operands, not --operands {args.operands}; leave the latter out")
    if args.activation_codeword_bits and not is_of_operands:
        raise ConfigError(f"--activation-codeword-bits needs --per operand or layer_operand, not {args.per}")


def _layouts(args: argparse.Namespace) -> tuple[Layout, Layout]:
    """Of weights and of activations. Raises ValueError for numbers that are no layout."""
    from qurl.quantization.lobcq import Layout

    layout = Layout(**{name: value for name in LAYOUT if (value := getattr(args, name)) is not None})
    return layout, replace(layout, codeword_bits=args.activation_codeword_bits or layout.codeword_bits)


def find_sets(args: argparse.Namespace, journal: Path) -> CodebookSets:
    """What the options ask for, all but args.out; see qurl.ptq.calibration.calibrated. Prints how it fits."""
    from qurl.cli.progress import progress_bar
    from qurl.ptq.calibration import ACTIVATIONS, WEIGHTS, Per, calibrated
    from qurl.ptq.evaluation import Text

    layout, activations = _layouts(args)
    text = Text(args.model, args.text, args.max_documents, args.context) if args.text else None
    with progress_bar("codebooks") as show:
        try:
            sets, found = calibrated(
                args.model, text, {WEIGHTS: layout, ACTIVATIONS: activations}, journal, per=Per(args.per),
                weights=args.operands != "activations", rotation=args.rotation, ignore=args.ignore, seed=args.seed, progress=show,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(str(error).replace("quantization.rotation=", "--rotation ")) from error
    _print(found)
    return sets


def _print(found: Sequence[FoundSet]) -> None:
    """A line for the sets of each operand, or of both."""
    for operands in dict.fromkeys(each.operands for each in found):
        some = [each for each in found if each.operands == operands]
        first, last = sum(each.first_error for each in some) / len(some), sum(each.error for each in some) / len(some)
        told = f"{operands}: {len(some)} sets of codebooks" if len(some) > 1 else operands
        print(f"{told}, {sum(each.num_blocks for each in some)} blocks, {max(each.num_rounds for each in some)} rounds; squared "
              f"error over squared numbers {first:.6f} at first, {last:.6f} with the codebooks")  # fmt: skip


def _command(args: argparse.Namespace) -> str:
    """What makes the file again, defaults and all."""
    options: dict[str, Any] = {"operands": args.operands, "per": args.per, **asdict(_layouts(args)[0])}
    options |= {"activation_codeword_bits": args.activation_codeword_bits, "rotation": args.rotation, "seed": args.seed}
    if args.text:
        options |= {"text": args.text, "max_documents": args.max_documents, "context": args.context}
    words = ["qurl", "calibrate", str(args.model), str(args.out)]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, *(word for pattern in args.ignore for word in ("--ignore", pattern))])
