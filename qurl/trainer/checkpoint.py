"""Checkpoints of a run: <run>/checkpoints/step_NNNNNN/ and `latest`, written last.

A checkpoint is written into a folder that no reader looks at, then renamed, then named by `latest`. Whatever ends the process on
the way (kill -9, full disk), `latest` names a complete one. The learner's files are a function of the step: where `latest` names a
step already, saving it again replaces the trainer's state alone, in one rename."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from qurl.errors import one_line
from qurl.shared_files import Written, host_name

TRAINER_STATE = "trainer_state.json"
FILES = "files"  # its entry about the files beside it
SEEN_WITHIN_S = 90.0  # a network file system may answer from a cache for up to a minute
POLL_S = 0.5
STEP = re.compile(r"step_(\d{6,})")


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
        name = pointer.read_text(errors="replace").strip()
        if not STEP.fullmatch(name):
            raise ValueError(f"{pointer} is damaged: it holds {name[:40]!r}; {self._remedy(without=name)}")
        if not (self._dir / name / TRAINER_STATE).is_file():
            raise ValueError(f"{pointer} names {name}, which is incomplete; {self._remedy(without=name)}")
        return self._dir / name

    def state(self, folder: Path) -> dict[str, Any]:
        """What save() stored beside the learner's files. Raises ValueError where it or one of those files is not whole."""
        try:
            state = json.loads((folder / TRAINER_STATE).read_text())
            written = state.pop(FILES)
        except (ValueError, KeyError) as error:
            raise self._damaged(folder, f"{TRAINER_STATE} is not readable: {one_line(error)}") from error
        found = _file_sizes(folder)
        for name, size in written.items():
            if name not in found:
                raise self._damaged(folder, f"{name} is gone")
            if found[name] != size:
                raise self._damaged(folder, f"{name} has {found[name]} of {size} bytes")
        return state

    async def save(self, step: int, state: dict[str, Any], save_learner: Callable[[Path], Awaitable[Written]]) -> Path:
        """Write one. save_learner: writes the learner's files, returns what each host then sees of them.

        Raises RuntimeError where the disk is full or a file of some host is not seen here; the previous one, if any, stays the
        latest."""
        name = f"step_{step:06d}"
        if _text(self._dir / "latest") == name:
            return self._save_state_again(self._dir / name, state)
        partial = self._dir / f".partial_{name}"
        try:
            for left in self._dir.glob(".partial_*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
            await _until_seen(partial, await save_learner(partial))
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
        self._prune(step)
        return self._dir / name

    def _save_state_again(self, folder: Path, state: dict[str, Any]) -> Path:
        """Replace the trainer's state in the newest checkpoint. Raises RuntimeError as save."""
        try:
            before = json.loads((folder / TRAINER_STATE).read_text())
            now = {**json.loads(json.dumps(state)), FILES: before[FILES]}
            if now != before:
                _write(folder / f".{TRAINER_STATE}", json.dumps(now))
                (folder / f".{TRAINER_STATE}").replace(folder / TRAINER_STATE)
        except OSError as error:
            told = f"the state in {folder} was not written again: {one_line(error)}; the one before is there"
            raise RuntimeError(told) from error
        return folder

    def _prune(self, newest: int) -> None:
        """Remove what keep_last does not keep. Steps beyond `newest`, left by a process that got further, are not counted."""
        steps = sorted(step for step in self._steps() if step <= newest)
        for old in steps[: -self._keep_last]:
            shutil.rmtree(self._dir / f"step_{old:06d}")

    def _steps(self) -> list[int]:
        return [int(match[1]) for path in self._dir.iterdir() if (match := STEP.fullmatch(path.name))]

    def _damaged(self, folder: Path, what: str) -> ValueError:
        return ValueError(f"checkpoint {folder} is damaged: {what}; {self._remedy(without=folder.name)}")

    def _remedy(self, without: str) -> str:
        """What to do about a `latest` that cannot be used; `without`: the folder that it names."""
        names = [f"step_{step:06d}" for step in sorted(self._steps(), reverse=True)]
        others = [name for name in names if name != without and (self._dir / name / TRAINER_STATE).is_file()]
        if others:
            return f"write {' or '.join(others)} into {self._dir / 'latest'}"
        return f"no other is there: remove {self._dir} to begin anew, or choose another run_name"


def _file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file but the state itself, by path below `folder`."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (TRAINER_STATE, f".{TRAINER_STATE}"))
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


async def _until_seen(folder: Path, written: Written) -> None:
    """Wait until every file that a host sees below `folder` is here, as large as there. Raises RuntimeError after SEEN_WITHIN_S."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while True:
        here = _file_sizes(folder)
        missing = [(host, name) for host, files in written.items() for name, size in files.items() if here.get(name) != size]
        if not missing:
            return
        if time.monotonic() > deadline:
            host, name = missing[0]
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise RuntimeError(
                f"{name} of {host}{more} is not seen on {host_name()}, where `qurl train` runs; output_dir must be a folder "
                "that all nodes share"
            )
        await asyncio.sleep(POLL_S)


def _text(path: Path) -> str:
    return path.read_text(errors="replace").strip() if path.is_file() else ""


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
