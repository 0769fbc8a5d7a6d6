"""Options of the commands that measure perplexity."""

from __future__ import annotations

import argparse

from qurl.errors import ConfigError

CONTEXT = 512


def add_text_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """--text, --max-documents, --context."""
    parser.add_argument(
        "--text", nargs="+", required=required, metavar="SOURCE",
        help="measure perplexity on these: .jsonl, .json, .parquet or .txt files, or hub datasets (NAME:CONFIGURATION)",
    )  # fmt: skip
    parser.add_argument("--max-documents", type=int, metavar="N", help="the first ones only")
    parser.add_argument(
        "--context", type=int, default=CONTEXT, metavar="N", help=f"tokens a document is cut into at most; default {CONTEXT}"
    )


def check_text_options(args: argparse.Namespace) -> None:
    """Raises ConfigError for numbers that leave nothing to measure."""
    if args.max_documents is not None and args.max_documents < 1:
        raise ConfigError(f"--max-documents {args.max_documents} leaves no document; use at least 1")
    if args.context < 2:
        raise ConfigError(f"--context {args.context} leaves no token to predict; use at least 2")
