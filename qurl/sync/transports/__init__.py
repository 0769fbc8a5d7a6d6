"""Ways for a bucket to get to the engines."""

from __future__ import annotations

from collections.abc import Callable

from qurl.plug import resolve
from qurl.sync.transports.base import Delivery, Transport
from qurl.sync.transports.cuda_ipc import CudaIpcTransport
from qurl.sync.transports.links import GlooTransport, NcclTransport
from qurl.sync.transports.object_store import ObjectStoreTransport
from qurl.sync.transports.shared_memory import SharedMemoryTransport

AUTO = "auto"

TRANSPORTS: dict[str, Callable[[int, float], Transport]] = {
    "object_store": ObjectStoreTransport,
    "shared_memory": SharedMemoryTransport,
    "gloo": GlooTransport,
    "nccl": NcclTransport,
    "cuda_ipc": CudaIpcTransport,
}
"""name -> class, constructed with (rank, timeout_s)."""


def choose_transport(name: str, *, device: str, colocate: bool) -> str:
    """What sync.transport=auto means; any other name is returned as it is.

    device: type of the device that holds the learner's weights, "cpu" or "cuda". colocate: engines share the learner's GPUs."""
    if name != AUTO:
        return name
    if device == "cpu":
        return "object_store"
    return "cuda_ipc" if colocate else "nccl"


def make_transport(name: str, rank: int, timeout_s: float) -> Transport:
    """A transport by its name in the table or by `package.module:attribute`. Raises ValueError for an unknown name."""
    return resolve(TRANSPORTS, name, "sync.transport")(rank, timeout_s)


__all__ = ["AUTO", "TRANSPORTS", "Delivery", "Transport", "choose_transport", "make_transport"]
