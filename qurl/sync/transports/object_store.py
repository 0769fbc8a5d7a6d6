"""Ray's object store: one copy per node, read in place by every engine process on it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qurl.sync.bucket import WireBucket, pack
from qurl.sync.protocol import EngineHandle, SyncError
from qurl.sync.transports.base import Delivery

if TYPE_CHECKING:  # imported where it is used: reading the table of transports must not load Ray
    from ray import ObjectRef


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectStorePayload:
    """A numpy array in the object store."""

    ref: ObjectRef
    timeout_s: float

    @contextmanager
    def open(self, links: dict[str, Any]) -> Iterator[Tensor]:
        """The array in place."""
        import ray

        if not ray.is_initialized():
            raise SyncError("this process has no Ray object store; use sync.transport=shared_memory or nccl")
        array = ray.get(self.ref, timeout=self.timeout_s)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
            buffer = torch.from_numpy(array)
        yield buffer


class ObjectStoreTransport:
    """Puts each bucket into the object store once."""

    def __init__(self, rank: int, timeout_s: float):
        self._timeout_s = timeout_s
        self._engines: list[EngineHandle] = []

    def start(self, engines: Sequence[EngineHandle]) -> None:
        """Remember the engines."""
        self._engines = list(engines)

    def send(self, bucket: WireBucket, pieces: Sequence[Tensor], receivers: Sequence[int]) -> Delivery:
        """The reference is held until release."""
        import ray

        array = np.empty(bucket.num_bytes, dtype=np.uint8)
        pack(pieces, torch.from_numpy(array))
        held = [ray.put(array)]
        loaded = replace(bucket, payload=ObjectStorePayload(ref=held[0], timeout_s=self._timeout_s))
        futures = {index: self._engines[index].receive_bucket.remote(loaded).future() for index in receivers}
        return Delivery(acknowledgements=futures, release=held.clear)

    def finish(self) -> None:
        """Forget the engines."""
        self._engines = []
