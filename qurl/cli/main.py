"""The `qurl` command: which subcommands there are, and what an exit code means.

    0    done
    1    the world failed: a process died, the disk is full; one line on stderr
    2    configuration or input error; one line on stderr says what, where and what would work
    3    stopped by a guard (non-finite loss, error rate, engine restarts)
    130  interrupted, after a checkpoint where there is something to save

Subcommands import what they need when they run, so that `--help` and a mistyped key answer at once."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from qurl import __version__
from qurl.errors import GuardStop, one_line

EXIT_FAILED, EXIT_USER, EXIT_GUARD, EXIT_INTERRUPTED = 1, 2, 3, 130

COMMANDS = {
    "train": "train a policy by reinforcement learning with verifiable rewards",
    "plan": "show batches, memory, placement and wire bytes of a run, without starting it",
    "eval": "avg@k, pass@k and maj@k of a model on named benchmarks, in any precision",
    "prepare": "make the data and the starting model of a recipe",
    "ablation": "one recipe under every correction, in several formats and seeds; a page about what that shows",
    "report": "one HTML page about a run, or several side by side",
    "export": "write a Hugging Face folder from a run or model, quantized if asked",
    "quantize": "write a checkpoint in any format, with the error of every matrix and the change in perplexity",
    "calibrate": "codebooks of LO-BCQ for a model, in any layout",
    "search": "the cheapest precision of Ax-BxP, by layer and operand, whose perplexity stays within a bound",
    "bench": "measure rollout, weight sync, perplexity and more, against full precision",
    "doctor": "what is installed, what this machine can run, what is wrong and the fix",
}
"""Subcommand -> what it does; `qurl.cli.<subcommand>` has add_arguments(parser) and main(args) -> exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code. QURL_TRACEBACK=1 shows the traceback of an error."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is loaded; threads that spin for longer starve other programs
    args = _parser(sys.argv[1:] if argv is None else list(argv))
    try:
        return importlib.import_module(f"qurl.cli.{args.command}").main(args)
    except ValueError as error:
        return _fail(error, EXIT_USER)
    except GuardStop as error:
        return _fail(error, EXIT_GUARD)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `qurl plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RuntimeError, OSError) as error:
        return _fail(error, EXIT_FAILED)


def _parser(argv: list[str]) -> argparse.Namespace:
    """Parse, importing only the chosen command. Exits with 2 and one line for an unknown option."""
    parser = Parser(
        prog="qurl",
        description="Reinforcement learning with verifiable rewards on quantized rollouts.",
        epilog="Examples:\n  qurl doctor\n  qurl prepare quickstart\n  qurl train recipe=quickstart quantization=int8\n"
        "  qurl report runs/quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qurl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, summary in COMMANDS.items():
        sentence = summary[0].upper() + summary[1:] + "."
        command = commands.add_parser(
            name, help=summary, description=sentence, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in argv:
            importlib.import_module(f"qurl.cli.{name}").add_arguments(command)
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "overrides") and not any(text.startswith("-") for text in rest):
        args.overrides += rest  # argparse takes positional arguments only in one run, not before and after an option
    elif rest:
        parser.error(f"unknown argument {rest[0]!r}")
    return args


class Parser(argparse.ArgumentParser):
    """argparse prints its usage before an error; ours is one line like every other."""

    def error(self, message: str):
        self.exit(EXIT_USER, f"error: {message}; see {self.prog} --help\n")


def _fail(error: BaseException, code: int) -> int:
    if os.environ.get("QURL_TRACEBACK") == "1":
        raise error
    print(f"error: {one_line(error)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
