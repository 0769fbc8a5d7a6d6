"""What was found so far on disk, so that a measurement that is killed goes on where it was, and a longer one after a shorter one.

A file holds what was asked for in its first line and one entry per line behind it, each with its name. A process that is killed
while it writes leaves half a line, which is cut off; a file of another question is begun anew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

from qurl.ptq.perplexity import DocumentLoss

Document = Sequence[list[int]]
NAME = "document"
"""Key of an entry's name, which is a document's hash in the files that there are most of."""


def journaled(
    path: Path,
    question: Mapping[str, Any],
    names: Sequence[str],
    measure: Callable[[int], Iterator[dict[str, Any]]],
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """An entry for each name: those in `path`, then those of measure(number of entries to skip), which is not called where none is
    missing. question: what decides the entries besides their names; it and they are JSON. progress: entries so far."""
    head = json.dumps(question)
    found = _read(path, head)
    lines = [entry for _, entry in takewhile(lambda pair: pair[0] == pair[1][NAME], zip(names, found, strict=False))]
    progress(len(lines))
    if len(lines) < len(names):
        with ExitStack() as stack:
            file = None
            for entry in measure(len(lines)):
                if file is None:  # not before: a measurement that does not start must not replace the file of another question
                    file = stack.enter_context(_begun(path, head, lines))
                lines.append({NAME: names[len(lines)], **entry})
                file.write(json.dumps(lines[-1]) + "\n")
                file.flush()
                progress(len(lines))
    assert len(lines) == len(names)
    return [{key: value for key, value in line.items() if key != NAME} for line in lines]


def journaled_losses(
    path: Path, question: Mapping[str, Any], documents: Sequence[Document], measure: Callable[[int], Iterator[DocumentLoss]]
) -> list[DocumentLoss]:
    """The losses of `documents`, named by hashes of their tokens: those in `path`, then those of measure(documents to skip)."""
    names = [hashlib.sha256(json.dumps(document).encode()).hexdigest()[:16] for document in documents]
    return [DocumentLoss(**entry) for entry in journaled(path, question, names, lambda skip: map(asdict, measure(skip)))]


def _begun(path: Path, head: str, lines: Sequence[dict[str, Any]]) -> TextIO:
    """The file with these entries, open for more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(f"{line}\n" for line in (head, *map(json.dumps, lines))))
    partial.replace(path)
    return path.open("a")


def _read(path: Path, head: str) -> list[dict[str, Any]]:
    """Whole lines of the same question."""
    if not path.is_file():
        return []
    found, *lines = path.read_text().split("\n")[:-1] or [""]
    return [json.loads(line) for line in lines] if found == head else []
