"""One process at a time: locks that the kernel drops with the process that holds them, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from qurl.errors import ConfigError


@contextmanager
def only_process(lock: Path, refusal: str) -> Iterator[None]:
    """Hold the file `lock`, removed at the end; its folder is created.

    Raises ConfigError(refusal) at once where another process holds it, and OSError where it cannot be written."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            file = stack.enter_context(lock.open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(refusal) from error
            if _is_at(lock, file):
                break  # else its last holder removed it before we had it
        stack.callback(lock.unlink, missing_ok=True)
        yield


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Of the file or folder `out`, which need not exist; the lock lies beside it.

    Raises ConfigError where there is another, or where nothing can be written there."""
    out = out.resolve()
    with ExitStack() as stack:
        try:
            refusal = f"another process writes {out}; wait for its end, or name another"
            stack.enter_context(only_process(out.with_name(f".{out.name}.lock"), refusal))
        except OSError as error:
            raise ConfigError(f"{out} cannot be written ({error.strerror})") from error
        yield


def _is_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
