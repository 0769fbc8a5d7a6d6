"""What the parts of the weight stream require of what they are given."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor


class SyncError(RuntimeError):
    """A weight update that must not be sampled from: something is missing, damaged, duplicated, late or of another version."""


class RemoteResult(Protocol):
    """What a remote call returns at once, like a Ray ObjectRef: `await` it or turn it into a future."""

    def future(self) -> Future[Any]:
        """Completes with the call."""

    def __await__(self) -> Any: ...


class RemoteMethod(Protocol):
    """A method of a Ray actor handle."""

    def remote(self, *args: Any) -> RemoteResult:
        """Start the call."""


class EngineHandle(Protocol):
    """A Ray actor handle of a rollout engine, or an equal of it; hashable. Each method raises SyncError to reject the update."""

    begin_weight_update: RemoteMethod  # (version)
    receive_bucket: RemoteMethod  # (WireBucket); returns once the tensors are installed and the payload is no longer read
    commit_weight_update: RemoteMethod  # (version, manifest: list[TensorRecord]) -> seconds spent verifying and installing


class Installer(Protocol):
    """Writes verified tensors into a model in place."""

    def begin(self) -> None:
        """An update starts; it may follow one that was broken off anywhere."""

    def install(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy some tensors, by Hugging Face name; all wire tensors of one weight matrix come in the same call. They are views
        of a buffer that is reused afterwards and must not be written to."""

    def finish(self) -> None:
        """Everything has arrived and was verified."""


class Payload(Protocol):
    """Where a receiver finds the bytes of a bucket; plain data that travels in the header."""

    def open(self, links: dict[str, Any]) -> AbstractContextManager[Tensor]:
        """The buffer, uint8 [num_bytes], to be read inside the `with` block only.

        links: what this transport keeps between buckets, owned by the receiver. Raises SyncError or OSError where it is gone."""
