"""`qurl eval`: the options, the progress bar, the table."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import fields
from typing import Any

from qurl.errors import ConfigError

LOG_WIDTH = 200  # of the table where standard output is no terminal

NUM_LOG_LINES = 20  # of progress, at least, where standard error is no terminal
LOG_INTERVAL_S = 60.0

PAIRED = {
    "data": "--data NAME=FILE",
    "engine_args": "--engine-arg NAME=VALUE",
    "chat_template_kwargs": "--chat-template-kwarg NAME=VALUE",
    "reward_kwargs": "--reward-arg NAME=VALUE",
}
"""Field of EvalConfig -> how its option is written."""

EPILOG = """Benchmarks: {benchmarks}.
Columns of the table: value [95 % interval], in percent, from a bootstrap over problems. avg@k and maj@k are over all samples.
The same command goes on where an earlier one was killed; results.json and problems.jsonl lie in the folder --out.

Examples:
  qurl eval runs/quickstart --benchmarks gsm8k --data gsm8k=outputs/quickstart/held_out.jsonl --prompt {{problem}}=
  qurl eval Qwen/Qwen2.5-Math-7B --benchmarks aime24 math500 --samples 32 --temperature 0.6 --max-tokens 3072 --format int8
  qurl eval models/r1 --benchmarks amc23 --data amc23=amc.json --reward deepscaler --max-tokens 32768"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per field of EvalConfig, whose defaults hold where an option is left out."""
    from qurl.evaluation.benchmarks import BENCHMARKS, PROMPTS

    add = parser.add_argument
    add("model", metavar="MODEL", help="Hugging Face folder, hub name, or run folder (its latest checkpoint)")
    add("--benchmarks", nargs="+", required=True, metavar="NAME", help="which, see below")
    add("--data", nargs="+", action="extend", metavar="NAME=FILE", help="a benchmark's problems from a local file")
    add("--format", help="precision of the engines: none, int8, fp8, fp8_block, mxfp4, ...; encoded while the model loads")
    add("--dtype", help="of what is not quantized; default auto: bfloat16, float32 on a CPU without its instructions")
    add("--ignore", nargs="+", metavar="PATTERN", help="modules to keep in full precision")
    add("--precision", metavar="SETTING|FILE", help="of --format axbxp: e.g. k4-w1-a2, or what `qurl search` wrote")
    add("--codebooks", metavar="FILE", help="of --format lobcq, lobcq_int8 or lobcq_w4a16; default: the package's")
    add("--rotation", type=int, metavar="N", help="blocks of so many inputs are rotated, of --format lobcq, nvfp4, ...; default 0")
    add("--group-size", type=int, metavar="N", help="inputs that share a scale, of --format int4 (128) and nf4 (64)")
    add("--samples", type=int, metavar="N", help="per problem")
    add("--k", type=int, nargs="+", metavar="K", help="of pass@k; default: the number of samples")
    add("--temperature", type=float, help="0: greedy")
    add("--top-p", type=float)
    add("--max-tokens", type=int, metavar="N", help="of a response")
    add("--max-prompt-tokens", type=int, metavar="N")
    add("--seed", type=int)
    add("--max-problems", type=int, metavar="N", help="the first ones only")
    prompts = ", ".join(PROMPTS)
    add("--prompt", metavar="NAME|TEMPLATE", help=f"{prompts}, or a text with {{problem}} in it; default: the benchmark's")
    add("--reward", metavar="NAME", help="reward function; default: the benchmark's")
    add("--reward-arg", dest="reward_kwargs", nargs="+", action="extend", metavar="NAME=VALUE",
        help="options of the reward function, e.g. boxless=anywhere truncated=true")
    add("--chat-template", action=argparse.BooleanOptionalAction, help="default: where the tokenizer has one")
    add("--chat-template-kwarg", dest="chat_template_kwargs", nargs="+", action="extend", metavar="NAME=VALUE",
        help="variables of the chat template, e.g. enable_thinking=false")
    add("--control-tokens", metavar="text|keep", help="what a control token is in a problem's own text; default text")
    add("--out", metavar="DIR", help="default: evals/<model>-<format>, then -<precision> or a hash, -rotation<N>, -group<N>")
    add("--engines", type=int, metavar="N")
    add("--tensor-parallel-size", type=int, metavar="N")
    add("--engine-arg", dest="engine_args", nargs="+", action="extend", metavar="NAME=VALUE", help="handed to vLLM")
    add("--reward-timeout-s", type=float, metavar="S", help="per response")
    add("--reward-workers", type=int, metavar="N")
    parser.epilog = EPILOG.format(benchmarks=", ".join(BENCHMARKS))


def main(args: argparse.Namespace) -> int:
    """Returns 0. Raises ConfigError or ValueError before anything heavy starts."""
    from qurl.evaluation.config import EvalConfig, validate

    options = {f.name: getattr(args, f.name) for f in fields(EvalConfig) if getattr(args, f.name) is not None}
    for name in PAIRED.keys() & options.keys():
        options[name] = _pairs(options[name], PAIRED[name])
    for name in {"engine_args", "chat_template_kwargs", "reward_kwargs"} & options.keys():
        options[name] = {key: _value(text) for key, text in options[name].items()}
    config = EvalConfig(**options)
    validate(config)
    return _evaluate(config)


class LogLines:
    """Which progress is worth a line of a log: NUM_LOG_LINES in all, and one a minute where problems take longer."""

    def __init__(self) -> None:
        self._said: int | None = None  # problems done
        self._said_at = 0.0

    def is_due(self, done: int, total: int, now: float) -> bool:
        """Whether to say it; the caller then does."""
        is_step = done != self._said and (done % max(1, total // NUM_LOG_LINES) == 0 or done == total)
        if self._said is not None and not is_step and now - self._said_at < LOG_INTERVAL_S:
            return False
        self._said, self._said_at = done, now
        return True


def _evaluate(config: Any) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from qurl.processes import ending_at_once

    with ending_at_once():
        from qurl.evaluation.evaluate import run_evaluation
    from qurl.evaluation.summary import table_rows

    bar = Progress(
        TextColumn("problems"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
        console=Console(stderr=True),
    )  # fmt: skip
    task = bar.add_task("")
    log = LogLines()

    def progress(done: int, total: int, speed: str) -> None:
        if not bar.console.is_terminal:  # where a bar would appear at its end only
            if log.is_due(done, total, time.monotonic()):
                print(f"problems {done}/{total}, {speed}", file=sys.stderr, flush=True)
            return
        bar.start()  # only now: what is refused before is one line of its own
        bar.update(task, completed=done, total=total, description=speed)

    try:
        results, path = run_evaluation(config, progress)
    finally:
        if bar.live.is_started:  # stopping prints a line even where nothing was shown
            bar.stop()
    _print(table_rows(results))
    print(path)
    return 0


def _print(rows: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], box=box.SIMPLE, pad_edge=False)
    for row in rows[1:]:
        table.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=LOG_WIDTH)).print(table)


def _pairs(texts: list[str], usage: str) -> dict[str, str]:
    """usage: "--data NAME=FILE", for errors."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"cannot read {text!r}; write {usage}")
        if name in pairs:
            raise ConfigError(f"{usage.split()[0]} {name} is given twice, as {pairs[name]} and as {value}")
        pairs[name] = value
    return pairs


def _value(text: str) -> Any:
    """A number, true, false or null as JSON writes it; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
