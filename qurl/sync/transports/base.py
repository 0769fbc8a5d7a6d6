"""What a transport is: it gets the bytes of a bucket to every engine, and its header with them.

A transport never makes one engine wait for another: engines fail separately, and each sender talks to each engine on its own.
Collectives that join all engines would be faster on many nodes, but one dead engine stalls all of them, and the broadcasts of
several senders deadlock unless all engines take them in one order, which gathering ZeRO-3 shards rank by rank cannot promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from qurl.sync.bucket import WireBucket
from qurl.sync.protocol import EngineHandle


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """A bucket under way."""

    acknowledgements: Mapping[int, Future[Any]]  # index of the engine -> done once it has installed the bucket
    release: Callable[[], None]  # frees the buffer; called once nobody is waited for any more


class Transport(Protocol):
    """Sender side, one per learner rank. Constructed with (rank, timeout_s)."""

    def start(self, engines: Sequence[EngineHandle]) -> None:
        """An update to these engines begins."""

    def send(self, bucket: WireBucket, pieces: Sequence[Tensor], receivers: Sequence[int]) -> Delivery:
        """Pack the pieces and start handing them to some of the engines, by index; does not wait for them.

        Raises SyncError where there is no room for the buffer."""

    def finish(self) -> None:
        """The update is over, however it ended; frees whatever is still held for it."""
