"""Where problems come from and how they become prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class OverlongPrompts(Enum):
    """What to do with prompts of more than max_prompt_tokens."""

    drop = "drop"
    error = "error"


@dataclass(kw_only=True, slots=True)
class DatasetConfig:
    """A JSONL, JSON or parquet file, or a hub dataset by name. verl's parquet schema (`prompt`, `reward_model.ground_truth`,
    `data_source`) is recognized by itself; the keys below are for plain rows."""

    path: str = ""  # empty: no dataset
    name: str | None = None  # hub configuration
    split: str = "train"  # hub split
    prompt_key: str = "problem"
    answer_key: str = "answer"
    data_source: str | None = None  # handed to the reward function; default: the row's data_source, else the file's stem
    unique: bool = False  # keep the first of rows that have the same problem and answer
    max_rows: int | None = None  # the first rows only, of those that are kept


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Training and evaluation problems."""

    train: DatasetConfig = field(default_factory=DatasetConfig)
    eval: dict[str, DatasetConfig] = field(default_factory=dict)  # name in the metrics -> dataset
    prompt_template: str = "{problem}"  # str.format over the row; the result is one user turn or the plain prompt
    chat_template: bool = False  # render with the tokenizer's chat template
    system_prompt: str | None = None  # with chat_template only
    max_prompt_tokens: int = 1024
    overlong_prompts: OverlongPrompts = OverlongPrompts.drop
    shuffle: bool = True
