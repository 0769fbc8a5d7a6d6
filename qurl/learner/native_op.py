"""DeepSpeed's shared-memory operation for CPUs, compiled once for each environment.

torch guards a build by a file named "lock" that only its builder removes. A process that is killed while it compiles leaves the
file, and every later one waits for it without end. Here builds have a folder of their own and happen under a lock that the kernel
drops with the process; whoever holds it knows that a file found there is stale."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def build_folder() -> Path:
    """TORCH_EXTENSIONS_DIR where it is set, else one of this Python environment in the cache of the user; created."""
    environment = hashlib.sha256(f"{sys.prefix} {sys.version}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "qurl" / "torch_extensions" / environment)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def exclusive_build(folder: Path) -> Iterator[None]:
    """One process at a time may compile in `folder`; what killed ones left locked is unlocked."""
    with (folder / ".qurl-build").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for stale in folder.rglob("lock"):
            stale.unlink(missing_ok=True)
        yield


def build(load: Callable[[], Any]) -> None:
    """Run DeepSpeed's `load`, which compiles where needed and remembers the result in this process."""
    folder = build_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    with exclusive_build(folder), contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints that it is done
        load()
