"""`qurl calibrate`: codebooks of LO-BCQ for a model, or with another layout."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qurl.errors import ConfigError

if TYPE_CHECKING:
    from qurl.quantization.lobcq import Layout

LAYOUT = {
    "block": "L_b, inputs that share a codebook", "array": "L_A, inputs that share a scale", "num_codebooks": "N_c",
    "codeword_bits": "of an entry, 6 for lobcq and lobcq_w4a16, 8 for lobcq_int8",
}  # fmt: skip
"""Fields of qurl.quantization.lobcq.Layout."""

EPILOG = """FILE is what quantization.codebooks=FILE of a run and --codebooks FILE of qurl quantize and qurl eval take.

Examples:
  qurl calibrate models/qwen books.json --text train.jsonl --max-documents 64 --block 4 --array 32 --num-codebooks 8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, file, text, layout."""
    from qurl.cli.text_options import add_text_options

    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder")
    parser.add_argument("out", type=Path, metavar="FILE", help="JSON; must not exist")
    parser.add_argument("--operands", default="both", choices=("both", "weights", "activations"), help="what to look at")
    add_text_options(parser, required=False)
    for name, meaning in LAYOUT.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"{meaning}; default: the package's")
    parser.add_argument("--rotation", type=int, default=0, metavar="N", help="look at what quantization.rotation makes; default 0")
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="modules to leave out; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.epilog = EPILOG


def main(args: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError for a model or text that cannot be read, or a layout that does not fit."""
    from qurl.cli.text_options import check_text_options
    from qurl.locks import only_writer
    from qurl.quantization.lobcq import Layout

    layout = Layout(**{name: value for name in LAYOUT if (value := getattr(args, name)) is not None})
    check_text_options(args)
    if not (args.model / "config.json").is_file():
        raise ConfigError(f"{args.model} is no Hugging Face folder; of a run, make one with `qurl export`")
    if (args.operands == "weights") != (args.text is None):
        told = "needs --text, which makes the activations; or use --operands weights" if args.text is None else "reads no --text"
        raise ConfigError(f"--operands {args.operands} {told}")
    with only_writer(args.out):
        if args.out.exists():
            raise ConfigError(f"{args.out} exists; name a new file")
        _calibrate(args, layout)
    print(args.out)
    return 0


def _calibrate(args: argparse.Namespace, layout: Layout) -> None:
    from qurl.ptq.calibration import model_blocks
    from qurl.ptq.evaluation import Text
    from qurl.quantization.lobcq.calibration import calibrate
    from qurl.quantization.lobcq.codebooks import save_codebooks

    text = Text(args.model, args.text, args.max_documents, args.context) if args.text else None
    weights = args.operands != "activations"
    try:
        blocks = model_blocks(
            args.model, text, layout, weights=weights, rotation=args.rotation, ignore=args.ignore, seed=args.seed
        )
    except ValueError as error:
        raise ConfigError(str(error).replace("quantization.rotation=", "--rotation ")) from error
    found = calibrate(blocks, layout, args.seed)
    save_codebooks(found.codebooks, args.out, _command(args, layout))
    energy = float(blocks.double().square().sum(dim=1).mean())
    print(f"{len(blocks)} blocks, {len(found.objective) - 1} rounds; squared error over squared numbers "
          f"{found.objective[0] / energy:.6f} at first, {found.rounded_objective / energy:.6f} with the codebooks")  # fmt: skip


def _command(args: argparse.Namespace, layout: Layout) -> str:
    """What makes the file again, defaults and all."""
    options: dict[str, Any] = {"operands": args.operands, **asdict(layout), "rotation": args.rotation, "seed": args.seed}
    if args.text:
        options |= {"text": args.text, "max_documents": args.max_documents, "context": args.context}
    words = ["qurl", "calibrate", str(args.model), str(args.out)]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, *(word for pattern in args.ignore for word in ("--ignore", pattern))])
