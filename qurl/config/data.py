"""Where problems come from and how they become prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class OverlongPrompts(Enum):
    """What to do with prompts of more than max_prompt_tokens."""

    drop = "drop"
    error = "error"


class ControlTokens(Enum):
    """What a control token of the tokenizer is where a row's own text spells it."""

    text = "text"  # encoded as the characters that it consists of, with a warning
    keep = "keep"  # a control token: for rows that are prompts rendered beforehand


@dataclass(kw_only=True, slots=True)
class DatasetConfig:
    """JSONL, JSON, CSV, TSV, parquet or Arrow files (text also as .gz, .bz2, .xz), or a hub dataset by name.

    verl's parquet schema (`prompt`, `reward_model.ground_truth`, `data_source`) is recognized by itself; the keys below are for
    plain rows."""

    path: Any = ""  # a file, a pattern such as shards/*.parquet, a hub dataset, or a list of these; empty: no dataset
    name: str | None = None  # hub configuration
    split: str = "train"  # hub split
    prompt_key: str = "problem"
    answer_key: str = "answer"
    data_source: str | None = None  # handed to the reward function; default: the row's data_source, else the file's stem
    unique: bool = False  # keep the first of rows that have the same problem and answer
    max_rows: int | None = None  # the first rows only, of those that are kept

    @property
    def paths(self) -> list[str]:
        """The parts that `path` names, in order."""
        return [str(path) for path in self.path] if isinstance(self.path, list | tuple) else [str(self.path)]


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Training and evaluation problems."""

    train: DatasetConfig = field(default_factory=DatasetConfig)
    eval: dict[str, DatasetConfig] = field(default_factory=dict)  # name in the metrics -> dataset
    prompt_template: str = "{problem}"  # str.format over the row; the result is one user turn or the plain prompt
    chat_template: bool = False  # render with the tokenizer's chat template
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # variables of the chat template: enable_thinking: false
    control_tokens: ControlTokens = ControlTokens.text  # what <|im_end|> in a row's own text is
    system_prompt: str | None = None  # with chat_template only
    max_prompt_tokens: int = 1024
    overlong_prompts: OverlongPrompts = OverlongPrompts.drop
    shuffle: bool = True
