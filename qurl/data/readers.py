"""Rows of a dataset as they are stored: JSONL, JSON, parquet, or a hub dataset. Nothing here knows what a column means.

A reader yields `(place, row)`; the place ("line 3", "row 2 counting from 0") is what an error about that row names. A byte order
mark, CRLF line ends and blank lines are read as if absent; a NUL byte means a half-written file and is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qurl.config import DatasetConfig

Rows = Iterator[tuple[str, Any]]


def read_rows(config: DatasetConfig, key: str) -> Rows:
    """Rows of the file or hub dataset `config.path`, in stored order.

    key: where the configuration stands, e.g. "data.train", for errors. ValueError where the path or its content cannot be read."""
    label = f"{key}.path={config.path!r}"
    if not config.path:
        raise ValueError(f"{key}.path is empty; name a .jsonl, .json or .parquet file or a hub dataset")
    if "\0" in config.path:
        raise ValueError(f"{label} holds a NUL byte")
    path = Path(config.path).expanduser()
    if not _is_file_name(config.path, path):
        return _read_hub(config, label)
    if path.is_dir():
        raise ValueError(f"{label}: it is a folder; name a file in it")
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{label}: suffix {path.suffix!r} is not supported; use {', '.join(READERS)}")
    if not path.is_file():
        raise ValueError(f"{label}: no such file (the current folder is {Path.cwd()})")
    return READERS[path.suffix.lower()](path, label)


def _is_file_name(text: str, path: Path) -> bool:
    """False for a hub name: `name` or `owner/name` that is neither on disk nor has a suffix of letters."""
    return path.exists() or path.suffix[1:].isalpha() or text.startswith(("/", ".", "~")) or text.count("/") > 1


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; a list of rows over several lines belongs in a .json file" if text.strip() == "[" else ""
        raise ValueError(f"{place}: not JSON ({error.msg} at column {error.colno}): {text[:80]!r}{hint}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nesting beyond the interpreter's stack
        raise ValueError(f"{place}: not usable JSON ({error})") from error


def _decode(data: bytes, place: str) -> str:
    if b"\0" in data:
        raise ValueError(f"{place}: NUL byte; the file is damaged or was not written to its end")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}); convert it") from error


def _strip_mark(data: bytes) -> bytes:
    return data.removeprefix(b"\xef\xbb\xbf")


def _read_jsonl(path: Path, label: str) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"line {number}"
            data = _strip_mark(line) if number == 1 else line
            if data.strip():
                yield place, _parse(_decode(data.rstrip(b"\r\n"), f"{label} {place}"), f"{label} {place}")


def _read_json(path: Path, label: str) -> Rows:
    text = _decode(_strip_mark(path.read_bytes()), label)
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object per line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        raise ValueError(f"{label} line {error.lineno}: not JSON ({error.msg} at column {error.colno}){hint}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{label}: not usable JSON ({error})") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        found = f"an object with keys {', '.join(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f'{label}: found {found}; use a list of rows or {{"data": [rows]}}')
    yield from _numbered(rows)


def _read_parquet(path: Path, label: str) -> Rows:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield from _numbered(row for batch in file.iter_batches() for row in batch.to_pylist())
    except ArrowException as error:
        raise ValueError(f"{label}: not a readable parquet file ({error})") from error


def _read_hub(config: DatasetConfig, label: str) -> Rows:
    """Rows through `datasets.load_dataset`: from the hub, or from its cache where there is no network."""
    from datasets import load_dataset
    from huggingface_hub.errors import HfHubHTTPError

    try:
        dataset = load_dataset(config.path, config.name, split=config.split)
    except (OSError, ValueError, HfHubHTTPError) as error:
        wanted = f"name={config.name}, split={config.split}"
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{label} ({wanted}): no such file here, and as a hub dataset it cannot be loaded: {type(error).__name__}: {reason}"
        ) from error
    yield from _numbered(dataset)


def _numbered(rows: Any) -> Rows:
    for index, row in enumerate(rows):
        yield f"row {index} counting from 0", row


READERS: dict[str, Callable[[Path, str], Rows]] = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
