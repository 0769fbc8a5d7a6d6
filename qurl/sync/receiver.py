"""The engine's end of the weight stream.

    begin(version)  ->  receive(bucket) in any order  ->  commit(version, manifest)

The bytes that arrived are checked against the bucket's header before they are installed, in place, so no second copy of the model
exists. From begin to commit the model is a mixture of two versions and nothing may sample from it. The manifest, which
reaches the engine through the driver and not with the data, then says whether what was installed is all of it, and the right one.
Any error leaves the receiver without a version until a later update succeeds; begin starts over after every failure."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qurl.sync.bucket import BucketEntry, WireBucket, unpack
from qurl.sync.delta import apply_changes
from qurl.sync.fingerprint import fingerprint
from qurl.sync.protocol import Installer, SyncError
from qurl.types import TensorRecord

NAMES_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class InstallReport:
    """A committed update."""

    install_s: float  # fetching, verifying and installing, from begin to commit
    num_tensors: int
    num_bytes: int  # of the tensors; fewer may have travelled


class WeightReceiver:
    """Verifies buckets and hands them to an installer. Calls may come from several threads; they are served one by one."""

    def __init__(self, installer: Installer):
        self._installer = installer
        self._lock = threading.Lock()
        self._version: int | None = None  # committed
        self._begun: int | None = None  # under way
        self._failure: str | None = None  # why the update under way was rejected
        self._installed: dict[str, TensorRecord] = {}
        self._base: dict[str, Tensor] = {}  # host copies that deltas are applied to
        self._base_version: int | None = None  # None: the copies are of no single version
        self._keep_base = False
        self._links: dict[str, Any] = {}
        self._install_s = 0.0

    @property
    def version(self) -> int | None:
        """Version of the installed weights; None before the first commit, during an update and after a failed one."""
        return self._version

    @property
    def is_ready(self) -> bool:
        """Whether the model holds one complete, verified version."""
        return self._version is not None

    def begin(self, version: int) -> None:
        """Start an update, whatever came before. From here on the receiver is not ready."""
        with self._lock:
            self._base_version = self._version if self._keep_base else None
            self._version, self._begun, self._failure = None, version, None
            self._installed, self._keep_base, self._install_s = {}, False, 0.0
            with self._rejecting(f"beginning version {version}"):
                self._installer.begin()

    def receive(self, bucket: WireBucket) -> None:
        """Verify one bucket and install its tensors. Raises SyncError; then the update is lost."""
        what = f"bucket {bucket.index} of rank {bucket.sender_rank} for version {bucket.version}"
        with self._lock, self._rejecting(what):
            if bucket.payload is None:
                raise SyncError(f"{what} has no payload")
            with bucket.payload.open(self._links) as buffer:  # first of all: also a bucket that is rejected must leave its link
                self._require_under_way(bucket.version, what)
                tensors: dict[str, Tensor] = {}
                for entry, pieces in unpack(bucket, buffer):
                    if entry.record.name in tensors or entry.record.name in self._installed:
                        raise SyncError(f"{entry.record.name} came twice in version {bucket.version}")
                    tensors[entry.record.name] = self._verified(bucket, entry, pieces)
                self._installer.install(tensors)
                self._installed |= {entry.record.name: entry.record for entry in bucket.entries}
                self._keep_base = bucket.keep_base

    def commit(self, version: int, manifest: Sequence[TensorRecord]) -> InstallReport:
        """Check that exactly the tensors of the manifest were installed. Raises SyncError where not."""
        what = f"committing version {version}"
        with self._lock, self._rejecting(what):
            self._require_under_way(version, what)
            self._check(manifest)
            self._installer.finish()
            self._base = {name: self._base[name] for name in self._installed} if self._keep_base else {}
            self._version, self._begun = version, None
        return InstallReport(
            install_s=self._install_s, num_tensors=len(manifest), num_bytes=sum(record.num_bytes for record in manifest)
        )

    @contextmanager
    def _rejecting(self, what: str) -> Iterator[None]:
        """Whatever goes wrong inside makes the receiver unfit to sample from; adds up the time."""
        started = time.perf_counter()
        try:
            yield
        except BaseException as error:  # raised again: this only records it
            self._version = None
            self._failure = self._failure or f"{what}: {error}"
            raise
        finally:
            self._install_s += time.perf_counter() - started

    def _require_under_way(self, version: int, what: str) -> None:
        if self._failure is not None:
            raise SyncError(f"{what}: the update was rejected before ({self._failure}); begin it again")
        if self._begun is None:
            raise SyncError(f"{what}: no weight update has begun")
        if version != self._begun:
            raise SyncError(f"{what}: the update under way is of version {self._begun}")

    def _verified(self, bucket: WireBucket, entry: BucketEntry, pieces: list[Tensor]) -> Tensor:
        """The whole tensor, whose fingerprint is that of the header."""
        record = entry.record
        tensor = pieces[0] if entry.delta is None else self._from_base(entry, pieces)
        found = fingerprint(tensor)
        if found != record.fingerprint:
            raise SyncError(
                f"{record.name} arrived damaged from rank {bucket.sender_rank}: fingerprint {found}, expected {record.fingerprint}"
            )
        if bucket.keep_base and entry.delta is None:
            self._base[record.name] = tensor.to("cpu", copy=True)
        return tensor

    def _from_base(self, entry: BucketEntry, pieces: list[Tensor]) -> Tensor:
        """The tensor that the changes make of our copy, which is updated."""
        record, delta = entry.record, entry.delta
        assert delta is not None
        if delta.base_version != self._base_version:
            held = "none" if self._base_version is None else f"version {self._base_version}"
            raise SyncError(f"{record.name} came as changes to version {delta.base_version}, but this engine holds {held}")
        base = self._base.get(record.name)
        if base is None or tuple(base.shape) != record.shape or str(base.dtype) != f"torch.{record.dtype}":
            raise SyncError(f"{record.name} came as changes to a tensor of another shape or dtype; send it whole")
        positions, values = (piece.cpu() for piece in pieces)
        if len(positions) and not (0 <= int(positions.min()) and int(positions.max()) < base.numel()):
            raise SyncError(f"{record.name} came with changes outside of its {base.numel()} elements")
        apply_changes(base, positions, values)
        return base

    def _check(self, manifest: Sequence[TensorRecord]) -> None:
        """Raises SyncError unless the manifest and what was installed are the same."""
        counts = Counter(record.name for record in manifest)
        expected = {record.name: record for record in manifest}
        complaints = {
            "are listed twice": sorted(name for name, count in counts.items() if count > 1),
            "never arrived": sorted(expected.keys() - self._installed.keys()),
            "arrived but are not in the manifest": sorted(self._installed.keys() - expected.keys()),
            "arrived with another content, dtype or shape": sorted(
                name for name in expected.keys() & self._installed.keys() if expected[name] != self._installed[name]
            ),
        }
        found = [f"{len(names)} tensors {what} ({', '.join(names[:NAMES_SHOWN])})" for what, names in complaints.items() if names]
        if not manifest:
            found.append("the manifest is empty")
        if found:
            raise SyncError(f"version {self._begun} is not what the manifest says: {'; '.join(found)}")
