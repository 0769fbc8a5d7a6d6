"""Losses of documents on disk, so that a measurement that is killed goes on where it was, and a longer one after a shorter one.

A file holds what was asked for in its first line and one document per line behind it, named by a hash of its tokens. A process that
is killed while it writes leaves half a line, which is cut off; a file of another question is begun anew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

from qurl.ptq.perplexity import DocumentLoss

Document = Sequence[list[int]]


def journaled_losses(
    path: Path, question: Mapping[str, Any], documents: Sequence[Document], measure: Callable[[int], Iterator[DocumentLoss]]
) -> list[DocumentLoss]:
    """The losses of `documents`: those in `path`, then those of measure(number of documents to skip), which is not called where
    none is missing. question: what decides the losses besides the documents, JSON only."""
    head = json.dumps(question)
    names = [hashlib.sha256(json.dumps(document).encode()).hexdigest()[:16] for document in documents]
    found = _read(path, head)
    done = [entry for _, entry in takewhile(lambda pair: pair[0] == pair[1]["document"], zip(names, found, strict=False))]
    losses = [DocumentLoss(**{key: value for key, value in entry.items() if key != "document"}) for entry in done]
    if len(losses) < len(documents):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(f"{line}\n" for line in (head, *map(json.dumps, done))))
        partial.replace(path)
        with path.open("a") as file:
            for loss in measure(len(losses)):
                file.write(json.dumps({"document": names[len(losses)], **asdict(loss)}) + "\n")
                file.flush()
                losses.append(loss)
    assert len(losses) == len(documents)
    return losses


def _read(path: Path, head: str) -> list[dict[str, Any]]:
    """Whole lines of the same question."""
    if not path.is_file():
        return []
    found, *lines = path.read_text().split("\n")[:-1] or [""]
    return [json.loads(line) for line in lines] if found == head else []
