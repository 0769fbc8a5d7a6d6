"""Plain text to train a language model on or to measure its perplexity with: whole documents, no prompts, no answers to check."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qurl.config import DatasetConfig
from qurl.data.readers import read_rows

LAYOUTS = (("text",), ("problem", "solution"), ("question", "solution"), ("problem", "answer"), ("question", "answer"))
"""Columns that make a document, in order of preference; they are joined by a line end."""


def load_documents(source: str, key: str, max_documents: int | None = None) -> list[str]:
    """The documents of a source, in stored order, none of them empty; the first `max_documents`.

    source: a .txt file, whose documents are separated by blank lines; a .jsonl, .json or .parquet file; or a hub dataset, as NAME
    or NAME:CONFIGURATION. key: the option that names the source, for errors. Raises ValueError for a source that cannot be read,
    holds no text or has rows without the columns of LAYOUTS."""
    if Path(source).suffix.lower() == ".txt":
        documents = _paragraphs(Path(source).expanduser(), f"{key}={source!r}")
    else:
        path, _, name = (source, "", "") if Path(source).exists() else source.partition(":")
        rows = read_rows(DatasetConfig(path=path, name=name or None), key)
        documents = [document for place, row in rows if (document := _document(row, f"{key}: {source} {place}"))]
    if not documents:
        raise ValueError(f"{key}={source!r} holds no text")
    return documents[:max_documents]


def _paragraphs(path: Path, label: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{label} cannot be read as UTF-8 text: {error}") from error
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    return ["\n".join(lines) for lines in paragraphs if lines]


def _document(row: Any, where: str) -> str:
    """"" where all columns of the row's layout are empty."""
    if isinstance(row, Mapping):
        for columns in LAYOUTS:
            if all(column in row for column in columns):
                return "\n".join(text for column in columns if (text := str(row[column] or "").strip()))
    found = f"has the columns {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"is a {type(row).__name__}"
    known = ", or ".join(" and ".join(columns) for columns in LAYOUTS)
    raise ValueError(f"{where} {found}; a document is {known}")
