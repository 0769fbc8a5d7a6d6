"""Preparations that can be interrupted: a folder filled stage by stage, each with a stamp written last."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def run_stage(
    folder: Path, name: str, settings: Mapping[str, Any], build: Callable[[], Sequence[Path]], *, force: bool = False
) -> bool:
    """Runs `build`, which returns what it wrote, unless the stamp of stage `name` in `folder` shows that it already ran.

    It ran where the stamp holds the same settings and everything it names still exists. Returns whether `build` ran now; later
    stages that depend on this one pass that on as `force`. settings: what decides the outcome, JSON only."""
    stamp = folder / f".{name}.json"
    settings = json.loads(json.dumps(settings))
    if not force and stamp.is_file():
        record = json.loads(stamp.read_text())
        if record["settings"] == settings and all((folder / path).exists() for path in record["wrote"]):
            return False
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    wrote = build()
    partial = stamp.with_suffix(".partial")
    partial.write_text(json.dumps({"settings": settings, "wrote": [str(path.relative_to(folder)) for path in wrote]}, indent=1))
    partial.replace(stamp)
    return True


def write_problems(path: Path, problems: Iterable[tuple[str, str]]) -> Path:
    """One JSON object per line, `problem` and `answer`; returns `path`."""
    with path.open("w") as file:
        for problem, answer in problems:
            file.write(json.dumps({"problem": problem, "answer": answer}) + "\n")
    return path
