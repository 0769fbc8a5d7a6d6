"""A file of JSON objects, one line per step, that survives a killed process and a resumed run."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def read_step_log(path: Path) -> list[dict[str, Any]]:
    """The objects of the file in order; [] where it does not exist.

    A last line cut short by a killed writer is left out with a warning. Raises ValueError with the line number for anything
    else that is not an object with an integer "step"."""
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                logger.warning("%s:%d is cut short; left out", path, number)
                break
            raise ValueError(f"{path}:{number} is not JSON ({error}); remove the line") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f'{path}:{number} is not an object with an integer "step"; remove the line')
        records.append(record)
    return records


class StepLog:
    """Appends flushed lines; the steps in the file are increasing, each there once."""

    def __init__(self, path: Path) -> None:
        """Opens the file of an earlier process, if any; raises as read_step_log."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._last_step = -1
        self._file = path.open("a", encoding="utf-8")
        self._keep(read_step_log(path))  # also ends a line cut short

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line with "step", "timestamp" (unix seconds) and the values; lines of this step and later ones go first.

        A value that is not finite becomes null, as JSON has none, and is logged."""
        self.drop_from(step)
        record = {"step": step, "timestamp": round(time.time(), 3)} | _finite(step, values)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._last_step = step

    def amend(self, step: int, change: Callable[[dict[str, Any]], Mapping[str, float]]) -> None:
        """Add values to the line of `step`, whole or not at all; nothing happens where the last line is another one's.

        change: the line's record -> values that are added to it or take the place of its own."""
        if step < 0 or step != self._last_step:
            return
        *before, record = read_step_log(self._path)
        self._keep([*before, record | _finite(step, change(record))])

    def drop_from(self, step: int) -> None:
        """Remove the lines of `step` and later ones, if any."""
        if step <= self._last_step:
            self._keep([r for r in read_step_log(self._path) if r["step"] < step])

    def close(self) -> None:
        """Idempotent."""
        self._file.close()

    def _keep(self, records: list[dict[str, Any]]) -> None:
        """Replace the file by these records, whole or not at all, also when killed here."""
        self._file.close()
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        os.replace(temporary, self._path)
        self._last_step = max((r["step"] for r in records), default=-1)
        self._file = self._path.open("a", encoding="utf-8")


def _finite(step: int, values: Mapping[str, float]) -> dict[str, Any]:
    """The values as floats; null for one that is not finite, which is logged."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found[key] = float(value) if math.isfinite(value) else None
        if found[key] is None:
            logger.warning("step %d: %s is %s; written as null", step, key, value)
    return found
