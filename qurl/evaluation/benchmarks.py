"""The named benchmarks: where their problems are, what a model is asked, who judges the answer.

A local file of the same problems may have other columns than the hub's dataset, so columns are looked up by what is there: the
first of LAYOUTS whose both columns the first row has. verl's layout is recognized as everywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qurl.config import DatasetConfig
from qurl.errors import ConfigError

if TYPE_CHECKING:  # qurl.data imports torch, which `qurl eval --help` does not wait for
    from qurl.data import Problem

PROMPTS = {
    "boxed": "{problem}\nLet's think step by step and output the final answer within \\boxed{{}}.",  # DeepScaleR's
    "dapo": "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\nRemember to put your answer on its own line "
    'after "Answer:".',
    "gsm8k": '{problem}\nLet\'s think step by step and give the final answer after "####".',
    "plain": "{problem}",
}
"""Name -> template of the user turn, as data.prompt_template."""

LAYOUTS = (("problem", "answer"), ("question", "answer"), ("question", "final_answer"), ("problem", "final_answer"))
"""(column of the problem, column of the answer), in order of preference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One named set of problems."""

    path: str  # hub dataset
    name: str | None = None  # hub configuration
    split: str = "test"
    prompt: str = "boxed"  # key of PROMPTS
    reward: str = "math"  # key of qurl.rewards.REWARDS


BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark(path="HuggingFaceH4/aime_2024", split="train"),
    "aime25": Benchmark(path="math-ai/aime25"),
    "amc23": Benchmark(path="math-ai/amc23"),
    "math500": Benchmark(path="HuggingFaceH4/MATH-500"),
    "minerva": Benchmark(path="math-ai/minervamath"),
    "olympiadbench": Benchmark(path="math-ai/olympiadbench"),
    "gsm8k": Benchmark(path="openai/gsm8k", name="main", prompt="gsm8k", reward="gsm8k"),
}


def load_problems(name: str, local_path: str | None, max_problems: int | None) -> list[Problem]:
    """Problems of a benchmark, from the hub or from `local_path`; the first `max_problems`.

    ConfigError or ValueError, naming `--data NAME`, for a file that cannot be read, has other columns or rows without an answer."""
    from qurl.data import load_rows
    from qurl.data.readers import read_rows

    benchmark, key = BENCHMARKS[name], f"benchmark {name}"
    dataset = DatasetConfig(
        path=benchmark.path, name=benchmark.name, split=benchmark.split, data_source=name, max_rows=max_problems
    )
    if local_path is not None:
        key = f"--data {name}"
        dataset = replace(dataset, path=local_path, name=None, split="train")
    try:
        place, row = next(read_rows(dataset, key), ("", None))
    except ValueError as error:
        raise error if local_path else ConfigError(f"{error}; or give a file: --data {name}=FILE") from error
    if row is None:
        raise ConfigError(f"{key}: {dataset.path} holds no rows")
    prompt_key, answer_key = _layout(row, f"{key}: {dataset.path} {place}")
    return load_rows(replace(dataset, prompt_key=prompt_key, answer_key=answer_key), key)


def _layout(row: Any, where: str) -> tuple[str, str]:
    """Columns of the problem and its answer. ConfigError where a row has neither layout nor verl's."""
    from qurl.data.problems import is_verl

    if isinstance(row, Mapping):
        if is_verl(row):
            return LAYOUTS[0]  # load_rows knows verl's columns
        for columns in LAYOUTS:
            if all(column in row for column in columns):
                return columns
    found = f"has the columns {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"is a {type(row).__name__}"
    known = ", or ".join(" and ".join(columns) for columns in LAYOUTS[:3])
    raise ConfigError(f"{where} {found}; a row of a benchmark has the columns {known}")
