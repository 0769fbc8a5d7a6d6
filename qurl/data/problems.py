"""Problems: rows with a meaning. Two layouts are understood: plain rows whose columns the configuration names, and verl's
(`prompt` as chat messages, `reward_model.ground_truth`, `data_source`, `extra_info`), which is recognized by itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from qurl.config import DatasetConfig
from qurl.data.files import kind_of
from qurl.data.readers import is_file_name, read_parts
from qurl.data.spill import Spill


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One row of a dataset before any tokenizer saw it."""

    row: int  # position among the dataset's rows, from 0
    place: str  # where the row stands in its file, for errors: "line 3"
    text: str  # the problem; of a chat, its last user turn
    messages: list[dict[str, str]] | None  # the whole chat, ending with a user turn; None for plain text
    answer: str  # ground truth as text, as qurl's own rewards read it, never empty
    data_source: str
    columns: Mapping[str, Any]  # the row as stored, for the prompt template
    extra: Mapping[str, Any]  # what else the row carried, handed to the reward function
    truth: Any = None  # the ground truth as stored where it is a list or an object; a reward of the user's own gets it so


def load_rows(config: DatasetConfig, key: str) -> list[Problem]:
    """The first `max_rows` problems of a dataset, in stored order; with `unique` none of them twice.

    key: where the configuration stands, e.g. "data.train" or "data.eval.aime". ValueError for a path, row or column that cannot
    be used, naming the file, the line, what was found and the configuration key."""
    if config.max_rows is not None and config.max_rows < 1:
        raise ValueError(f"{key}.max_rows={config.max_rows} leaves no row; use at least 1, or null for all")
    rows = ((source, place, row) for source, part in read_parts(config, key) for place, row in part)
    spill = Spill()
    stored = (_problem(index, source, place, row, config, key, spill) for index, (source, place, row) in enumerate(rows))
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


def _problem(index: int, source: str, place: str, row: Any, config: DatasetConfig, key: str, spill: Spill) -> Problem:
    where = place if place.startswith(source) else f"{source} {place}"
    if not isinstance(row, Mapping):
        raise ValueError(f"{key}.path: {where} is a {type(row).__name__}, not an object with columns")
    prompt_field, answer_field = f"{key}.prompt_key={config.prompt_key!r}", f"{key}.answer_key={config.answer_key!r}"
    columns = dict(row)
    if is_verl(row, config.prompt_key):
        prompt_field, answer_field = f"{key}.path: prompt", f"{key}.path: reward_model.ground_truth"
        prompt, answer, used = _chat(row["prompt"]), _decoded(row["reward_model"])["ground_truth"], {"prompt", "reward_model"}
    else:
        prompt, answer = (
            _column(row, name, option, where, key)
            for name, option in ((config.prompt_key, "prompt_key"), (config.answer_key, "answer_key"))
        )
        prompt, used = _chat(prompt), {config.prompt_key, config.answer_key}
    messages = _messages(prompt, f"{key}.path: {where}") if isinstance(prompt, list) else None
    text = messages[-1]["content"] if messages else prompt
    if not isinstance(text, str) or not text.strip():
        found = "empty" if text is None or isinstance(text, str) else f"a {type(text).__name__}"
        raise ValueError(f"{prompt_field}: the problem of {where} is {found}; it must be text or a chat")
    columns.setdefault(config.prompt_key, text)  # of a verl row, for a template that names the column
    extra_info = _decoded(row.get("extra_info"))
    extra = {name: value for name, value in row.items() if name not in used | {"data_source", "extra_info"}}
    extra |= extra_info if isinstance(extra_info, Mapping) else {}
    kept_columns, kept_extra = spill.kept(columns, extra)
    return Problem(
        row=index,
        place=place,
        text=_unicode(text, f"{key}.path: {where}"),
        messages=messages,
        answer=_unicode(_answer(answer, f"{answer_field}: {where}"), f"{key}.path: {where}"),
        truth=answer if isinstance(answer, list | dict) else None,
        data_source=config.data_source or str(row.get("data_source") or _default_source(source)),
        columns=kept_columns,
        extra=kept_extra,
    )


def is_verl(row: Mapping[str, Any], prompt_key: str = "") -> bool:
    """Return whether a row has verl's layout: a `prompt`, a chat, and `reward_model` with a `ground_truth`.

    A `prompt` that is plain text is verl's where the row has no column `prompt_key`."""
    reward_model = _decoded(row.get("reward_model"))
    is_prompt = isinstance(_chat(row.get("prompt")), list) or (isinstance(row.get("prompt"), str) and prompt_key not in row)
    return is_prompt and isinstance(reward_model, Mapping) and "ground_truth" in reward_model


def _decoded(value: Any) -> Any:
    """Return what a text of JSON, as CSV and some parquet files store an object or list, says; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _chat(prompt: Any) -> Any:
    """Return the turns of a chat that is stored as JSON text; any other prompt as it is."""
    if isinstance(prompt, str) and prompt.lstrip().startswith("[") and '"role"' in prompt and '"content"' in prompt:
        turns = _decoded(prompt)
        if isinstance(turns, list) and turns and all(isinstance(turn, Mapping) and "role" in turn for turn in turns):
            return turns
    return prompt


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
    """The ground truth as text; "" where there is none. A list, whose elements are alternatives, becomes "['2', '3']", or its
    only element; an object, or a list of them, becomes JSON."""
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):
        return ""
    if isinstance(answer, Mapping) or (isinstance(answer, list) and any(isinstance(item, list | Mapping) for item in answer)):
        try:
            return json.dumps(answer, sort_keys=True, ensure_ascii=False) if answer else ""
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: the answer cannot be written as JSON ({error}); use text or numbers") from error
    if isinstance(answer, list):
        alternatives = [_answer(element, where) for element in answer]
        if not alternatives or not all(alternatives):
            return ""
        return alternatives[0] if len(alternatives) == 1 else str(alternatives)
    if isinstance(answer, float | Decimal) and math.isfinite(answer):
        return _number(answer)
    if not isinstance(answer, str | int):
        raise ValueError(f"{where}: the answer is {str(answer)[:80]}; use text, a finite number, a list of them or an object")
    text = str(answer)
    return text if text.strip() else ""


def _number(value: float | Decimal) -> str:
    """Return a number without exponent, and an integer without fraction: data frames store 72 beside a missing value as 72.0."""
    text = f"{Decimal(repr(value)) if isinstance(value, float) else value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _unicode(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half of a surrogate pair at character {error.start}; no tokenizer can encode it") from error
    return text


def _default_source(source: str) -> str:
    """A file's name without suffixes; a hub dataset's whole name."""
    if not is_file_name(source):
        return source
    file = Path(source)
    return file.with_suffix("").stem if kind_of(file)[1] else file.stem
