"""Losses of documents on disk, so that a measurement that is killed goes on where it was.

A file holds what was asked for in its first line and one document per line behind it. A process that is killed while it writes
leaves half a line, which is cut off; a file of another question is begun anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qurl.ptq.perplexity import DocumentLoss


def journaled_losses(
    path: Path, question: Mapping[str, Any], num_documents: int, measure: Callable[[int], Iterator[DocumentLoss]]
) -> list[DocumentLoss]:
    """The losses of `num_documents` documents: those in `path`, then those of measure(number of documents to skip), which is not
    called where none is missing. question: what decides the losses, JSON only."""
    question = json.loads(json.dumps(question))
    done = _read(path, question)
    if len(done) < num_documents:
        path.parent.mkdir(parents=True, exist_ok=True)
        _rewrite(path, question, done)
        with path.open("a") as file:
            for loss in measure(len(done)):
                file.write(json.dumps(asdict(loss)) + "\n")
                file.flush()
                done.append(loss)
    assert len(done) == num_documents
    return done


def _read(path: Path, question: Mapping[str, Any]) -> list[DocumentLoss]:
    """Whole lines of the same question."""
    if not path.is_file():
        return []
    head, *lines = path.read_text().split("\n")[:-1] or [""]
    if head != json.dumps(question):
        return []
    return [DocumentLoss(**json.loads(line)) for line in lines]


def _rewrite(path: Path, question: Mapping[str, Any], done: Sequence[DocumentLoss]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(f"{json.dumps(line)}\n" for line in (question, *map(asdict, done))))
    partial.replace(path)
