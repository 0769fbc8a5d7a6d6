"""`qurl export`: a Hugging Face folder from a run or a model, in full or low precision."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from qurl.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, target, format."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a run folder (its latest checkpoint) or a Hugging Face folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    parser.add_argument("--format", default="none", help="none, int8, fp8, fp8_block, mxfp4, int4: what plain vLLM serves")
    parser.add_argument("--group-size", type=int, default=0, metavar="N", help="inputs that share a scale, of --format int4 (128)")
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="modules to keep as they are; repeatable")
    parser.epilog = "For all other formats, and a report of what quantization costs: qurl quantize.\n\nExamples:\n"
    parser.epilog += "  qurl export runs/quickstart out --format int8\n  qurl export models/qwen out --format fp8"


def main(args: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError for a source that cannot be exported or an output that exists."""
    from qurl.quantization import FORMATS, export_checkpoint, resolved_format
    from qurl.trainer.export import export_run

    if args.format not in FORMATS:
        raise ConfigError(f"--format {args.format} is unknown; use one of {', '.join(FORMATS)}")
    try:
        format = resolved_format(args.format, group_size=args.group_size)
    except ValueError as error:
        raise ConfigError(str(error).replace("quantization.group_size=", "--group-size ")) from error
    if args.out.exists():
        raise ConfigError(f"{args.out} exists; export to a new folder")
    if not (args.source / "config.yaml").is_file():
        export_checkpoint(args.source, args.out, format, args.ignore)
    elif args.format == "none":
        asyncio.run(export_run(args.source, args.out))
    else:
        with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
            asyncio.run(export_run(args.source, Path(folder) / "model"))
            export_checkpoint(Path(folder) / "model", args.out, format, args.ignore)
    print(args.out)
    return 0
