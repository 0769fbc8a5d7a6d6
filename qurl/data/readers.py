"""Rows of a dataset as they are stored: of a file, of several, of a pattern, or of a hub dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from qurl.config import DatasetConfig
from qurl.data.files import GLOB_CHARACTERS, Rows, files_of, kind_of, numbered, read_file


def read_rows(config: DatasetConfig, key: str) -> Rows:
    """Yield the rows of all parts of a dataset, in stored order, each with its place: "line 3", or "b.jsonl line 3" of several.

    key: where the configuration stands, e.g. "data.train", for errors. ValueError where a path or its content cannot be read."""
    for _, rows in read_parts(config, key):
        yield from rows


def read_parts(config: DatasetConfig, key: str) -> Iterator[tuple[str, Rows]]:
    """Yield (path of a file or name of a hub dataset, its rows). All paths are checked before the first row is read."""
    parts: list[tuple[str, Callable[[], Rows]]] = []
    for path in config.paths:
        label = f"{key}.path={path!r}"
        if not path:
            raise ValueError(
                f"{key}.path is empty; name a .jsonl, .json, .csv or .parquet file or a hub dataset"
            )
        if "\0" in path:
            raise ValueError(f"{label} holds a NUL byte")
        if is_file_name(path):
            files = files_of(path, label)
            labels = [label if len(files) == 1 else f"{label} {file}" for file in files]
            parts += [
                (str(file), partial(read_file, file, of_file))
                for file, of_file in zip(files, labels, strict=True)
            ]
        else:
            parts.append((path, partial(_read_hub, config, path, label)))
    for path, read in parts:
        name = f"{path} " if len(parts) > 1 else ""
        yield path, ((name + place, row) for place, row in read())


def is_file_name(text: str) -> bool:
    """Return False for a hub name: `name` or `owner/name` that is neither on disk nor has a suffix of letters."""
    path = Path(text).expanduser()
    is_marked = text.startswith(("/", ".", "~")) or any(character in text for character in GLOB_CHARACTERS)
    return (
        path.exists()
        or kind_of(path)[1] != ""
        or path.suffix[1:].isalpha()
        or is_marked
        or text.count("/") > 1
    )


def _read_hub(config: DatasetConfig, path: str, label: str) -> Rows:
    """Rows through `datasets.load_dataset`: from the hub, or from its cache where there is no network."""
    from datasets import load_dataset
    from huggingface_hub.errors import HfHubHTTPError

    try:
        dataset = load_dataset(path, config.name, split=config.split)
    except (OSError, ValueError, HfHubHTTPError) as error:
        wanted = f"name={config.name}, split={config.split}"
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{label} ({wanted}): no such file here, and as a hub dataset it cannot be loaded: {type(error).__name__}: {reason}"
        ) from error
    yield from numbered(dataset)
