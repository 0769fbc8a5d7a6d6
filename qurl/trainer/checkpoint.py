"""Checkpoints of a run: <run>/checkpoints/step_NNNNNN/ and `latest`, written last.

A checkpoint is written into a folder that no reader looks at, then renamed, then named by `latest`. Whatever ends the process on
the way (kill -9, full disk), `latest` names a complete one."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from qurl.errors import one_line

TRAINER_STATE = "trainer_state.json"
FILES = "files"  # its entry about the files beside it


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_dir: Path, keep_last: int):
        self._dir = run_dir / "checkpoints"
        self._keep_last = keep_last

    def latest(self) -> Path | None:
        """Folder of the newest complete checkpoint. Raises ValueError where `latest` names one that is not there."""
        pointer = self._dir / "latest"
        if not pointer.exists():
            return None
        folder = self._dir / pointer.read_text().strip()
        if not (folder / TRAINER_STATE).is_file():
            raise ValueError(f"{pointer} names {folder.name}, which is incomplete; write the name of another step folder into it")
        return folder

    def state(self, folder: Path) -> dict[str, Any]:
        """What save() stored beside the learner's files. Raises ValueError where it or one of those files is not whole."""
        try:
            state = json.loads((folder / TRAINER_STATE).read_text())
            written = state.pop(FILES)
        except (ValueError, KeyError) as error:
            raise _damaged(folder, f"{TRAINER_STATE} is not readable: {one_line(error)}") from error
        found = _file_sizes(folder)
        for name, size in written.items():
            if found.get(name) != size:
                raise _damaged(folder, f"{name} has {found.get(name, 0)} of {size} bytes")
        return state

    async def save(self, step: int, state: dict[str, Any], save_learner: Callable[[Path], Awaitable[None]]) -> Path:
        """Write one. Raises RuntimeError where the disk is full; the previous one, if any, stays the latest."""
        name = f"step_{step:06d}"
        partial = self._dir / f".partial_{name}"
        try:
            for left in self._dir.glob(".partial_*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
            await save_learner(partial)
            _write(partial / TRAINER_STATE, json.dumps({**state, FILES: _file_sizes(partial)}))
            shutil.rmtree(self._dir / name, ignore_errors=True)
            partial.rename(self._dir / name)
            _write(self._dir / ".latest", name)
            (self._dir / ".latest").replace(self._dir / "latest")
        except (OSError, RuntimeError) as error:  # torch's word for a full disk is a RuntimeError
            free = shutil.disk_usage(self._dir).free >> 20
            shutil.rmtree(partial, ignore_errors=True)
            kept = "the previous one is still the latest" if (self._dir / "latest").exists() else "there is no earlier one"
            told = f"checkpoint of step {step} was not written ({free} MiB were free in {self._dir}): {one_line(error)}; {kept}"
            raise RuntimeError(told) from error
        self._prune()
        return self._dir / name

    def _prune(self) -> None:
        steps = sorted(p for p in self._dir.iterdir() if re.fullmatch(r"step_\d{6,}", p.name))
        for old in steps[: -self._keep_last]:
            shutil.rmtree(old)


def _file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file but the state itself, by path below `folder`."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != TRAINER_STATE)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(f"checkpoint {folder} is damaged: {what}; write another step folder's name into {folder.parent / 'latest'}")


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
