"""Files in shared memory on one node, readable from any process on it.

Each sender keeps its files in a folder of its own and holds a lock on the folder (flock), which the kernel drops when the process
ends, however it ends and in whatever process namespace. A sender that starts removes folders whose lock it can take: what
killed processes left behind. Files are unlinked as soon as all engines have read them."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qurl.sync.bucket import WireBucket, pack
from qurl.sync.protocol import EngineHandle, SyncError
from qurl.sync.transports.base import Delivery

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "qurl-sync-"


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedMemoryPayload:
    """A file in shared memory."""

    path: str

    @contextmanager
    def open(self, links: dict[str, Any]) -> Iterator[Tensor]:
        """The mapped file. Raises SyncError where it is gone: the sender ended or gave up, or runs on another node."""
        try:
            with open(self.path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # copy on write, and nobody writes
        except FileNotFoundError as error:
            raise SyncError(
                f"no bucket at {self.path}; its sender gave up, or is on another node, where sync.transport=object_store works"
            ) from error
        yield torch.frombuffer(mapped, dtype=torch.uint8)  # the mapping ends with the last view of it


class SharedMemoryTransport:
    """Writes each bucket into one file."""

    def __init__(self, rank: int, timeout_s: float):
        self._rank = rank
        self._engines: list[EngineHandle] = []
        remove_abandoned()
        self._folder, self._lock = _locked_folder()
        self._close = weakref.finalize(self, _remove_folder, self._folder, self._lock)

    def start(self, engines: Sequence[EngineHandle]) -> None:
        """Remember the engines."""
        self._engines = list(engines)

    def send(self, bucket: WireBucket, pieces: Sequence[Tensor], receivers: Sequence[int]) -> Delivery:
        """Raises SyncError, before anything is written, where shared memory has no room for the bucket."""
        path = self._folder / f"r{self._rank}-v{bucket.version}-b{bucket.index}"
        buffer = _create(path, bucket.num_bytes)
        pack(pieces, buffer)
        loaded = replace(bucket, payload=SharedMemoryPayload(path=str(path)))
        futures = {index: self._engines[index].receive_bucket.remote(loaded).future() for index in receivers}
        return Delivery(acknowledgements=futures, release=partial(path.unlink, missing_ok=True))

    def finish(self) -> None:
        """Remove files that were not released."""
        self._engines = []
        for path in self._folder.iterdir():
            path.unlink(missing_ok=True)


def remove_abandoned() -> int:
    """Remove what senders that are no longer alive left in shared memory; how many folders."""
    removed = 0
    for folder in SHARED_MEMORY.glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY)
        except (FileNotFoundError, PermissionError):  # just removed, or another user's
            continue
        if _try_lock(lock):
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
        os.close(lock)
    return removed


def _locked_folder() -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=SHARED_MEMORY))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # removed by somebody's remove_abandoned before we had the lock
            continue
        if _try_lock(lock) and folder.exists():
            return folder, lock
        os.close(lock)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_folder(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _create(path: Path, num_bytes: int) -> Tensor:
    """A mapped file of num_bytes whose pages are reserved, so that writing to it cannot run out of memory."""
    with open(path, "xb+") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            path.unlink()
            if error.errno != errno.ENOSPC:
                raise
            free = shutil.disk_usage(SHARED_MEMORY).free
            raise SyncError(
                f"sync.transport=shared_memory needs {num_bytes} bytes for a bucket but {SHARED_MEMORY} has {free} free; "
                "make it larger (docker --shm-size), or lower sync.bucket_bytes or sync.max_inflight_buckets"
            ) from error
        return torch.frombuffer(mmap.mmap(file.fileno(), num_bytes), dtype=torch.uint8)
