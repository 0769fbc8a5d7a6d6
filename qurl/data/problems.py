"""Problems: rows with a meaning. Two layouts are understood: plain rows whose columns the configuration names, and verl's
(`prompt` as chat messages, `reward_model.ground_truth`, `data_source`, `extra_info`), which is recognized by itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qurl.config import DatasetConfig
from qurl.data.readers import read_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One row of a dataset before any tokenizer saw it."""

    row: int  # position among the dataset's rows, from 0
    place: str  # where the row stands in its file, for errors: "line 3"
    text: str  # the problem; of a chat, its last user turn
    messages: list[dict[str, str]] | None  # the whole chat, ending with a user turn; None for plain text
    answer: str  # ground truth as the reward function reads it, never empty
    data_source: str
    columns: dict[str, Any]  # the row as stored, for the prompt template
    extra: dict[str, Any]  # what else the row carried, handed to the reward function


def load_rows(config: DatasetConfig, key: str) -> list[Problem]:
    """The first `max_rows` problems of a dataset, in stored order; with `unique` none of them twice.

    key: where the configuration stands, e.g. "data.train" or "data.eval.aime". ValueError for a path, row or column that cannot
    be used, naming the file, the line, what was found and the configuration key."""
    if config.max_rows is not None and config.max_rows < 1:
        raise ValueError(f"{key}.max_rows={config.max_rows} leaves no row; use at least 1, or null for all")
    stored = (_problem(index, place, row, config, key) for index, (place, row) in enumerate(read_rows(config, key)))
    problems = list(islice(_unique(stored) if config.unique else stored, config.max_rows))
    if not problems:
        raise ValueError(f"{key}.path={config.path!r} holds no rows")
    unanswered = [problem.place for problem in problems if not problem.answer]
    if unanswered:
        shown = ", ".join(unanswered[:5]) + (", ..." if len(unanswered) > 5 else "")
        raise ValueError(
            f"{key}.answer_key={config.answer_key!r}: {config.path} has no answer (null or empty) in {len(unanswered)} of "
            f"{len(problems)} rows ({shown}); remove them or name another column"
        )
    return problems


def _unique(problems: Iterable[Problem]) -> Iterator[Problem]:
    seen = set()
    for problem in problems:
        if (content := (problem.text, problem.answer)) not in seen:
            seen.add(content)
            yield problem


def _problem(index: int, place: str, row: Any, config: DatasetConfig, key: str) -> Problem:
    where = f"{config.path} {place}"
    if not isinstance(row, Mapping):
        raise ValueError(f"{key}.path: {where} is a {type(row).__name__}, not an object with columns")
    if is_verl(row):
        prompt, answer, used = row["prompt"], row["reward_model"]["ground_truth"], {"prompt", "reward_model"}
    else:
        prompt, answer = (
            _column(row, name, option, where, key)
            for name, option in ((config.prompt_key, "prompt_key"), (config.answer_key, "answer_key"))
        )
        used = {config.prompt_key, config.answer_key}
    messages = _messages(prompt, f"{key}.path: {where}") if isinstance(prompt, list) else None
    text = messages[-1]["content"] if messages else prompt
    if not isinstance(text, str) or not text.strip():
        found = "empty" if text is None or isinstance(text, str) else f"a {type(text).__name__}"
        raise ValueError(f"{key}.prompt_key={config.prompt_key!r}: the problem of {where} is {found}; it must be text or a chat")
    extra_info = row.get("extra_info")
    extra = {name: value for name, value in row.items() if name not in used | {"data_source", "extra_info"}}
    return Problem(
        row=index, place=place, text=_unicode(text, f"{key}.path: {where}"), messages=messages,
        answer=_unicode(_answer(answer, f"{key}.answer_key={config.answer_key!r}: {where}"), f"{key}.path: {where}"),
        data_source=config.data_source or str(row.get("data_source") or _default_source(config.path)),
        columns=dict(row), extra={**extra, **extra_info} if isinstance(extra_info, Mapping) else extra,
    )  # fmt: skip


def is_verl(row: Mapping[str, Any]) -> bool:
    """Whether a row has verl's layout."""
    reward_model = row.get("reward_model")
    return isinstance(row.get("prompt"), list) and isinstance(reward_model, Mapping) and "ground_truth" in reward_model


def _column(row: Mapping[str, Any], name: str, option: str, where: str, key: str) -> Any:
    if name not in row:
        raise ValueError(f"{key}.{option}={name!r}: {where} has no such column; found {', '.join(map(str, row)) or 'none'}")
    return row[name]


def _messages(prompt: list[Any], where: str) -> list[dict[str, str]]:
    for turn in prompt:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(name), str) for name in ("role", "content")):
            raise ValueError(f"{where}: a chat turn must be {{role, content}} with text in both; found {str(turn)[:120]}")
    if not prompt or prompt[-1]["role"] != "user":
        raise ValueError(f"{where}: a chat must end with a user turn; found roles {[turn['role'] for turn in prompt]}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in prompt]


def _answer(answer: Any, where: str) -> str:
    """The ground truth as text; "" where there is none. A list, whose elements are alternatives, becomes "['2', '3']"."""
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):
        return ""
    if isinstance(answer, list) and not any(isinstance(element, list) for element in answer):
        alternatives = [_answer(element, where) for element in answer]
        return str(alternatives) if all(alternatives) and alternatives else ""
    if not isinstance(answer, str | int | float) or (isinstance(answer, float) and math.isinf(answer)):
        raise ValueError(f"{where}: the answer is {str(answer)[:80]}; use text, a finite number or a list of them")
    text = str(answer)
    return text if text.strip() else ""


def _unicode(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half of a surrogate pair at character {error.start}; no tokenizer can encode it") from error
    return text


def _default_source(path: str) -> str:
    """A file's stem; a hub dataset's whole name."""
    file = Path(path)
    return file.stem if file.suffix.lower() in (".jsonl", ".json", ".parquet") else path
