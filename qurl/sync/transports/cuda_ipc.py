"""CUDA IPC: engines map the sender's buffer. For processes that share a GPU, or GPUs with peer access on one node.

Needs PyTorch's ordinary caching allocator (not expandable_segments:True, whose memory has no IPC handle)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from qurl.sync.bucket import WireBucket, pack
from qurl.sync.protocol import EngineHandle, SyncError
from qurl.sync.transports.base import Delivery

DEVICE_ARGUMENT = 6  # position of the device index in rebuild_cuda_tensor's arguments


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaIpcPayload:
    """A handle of the sender's memory."""

    handle: tuple[Any, ...]  # arguments of rebuild_cuda_tensor
    device_uuid: str  # the same physical GPU may have another index in the receiver

    @contextmanager
    def open(self, links: dict[str, Any]) -> Iterator[Tensor]:
        """The sender's buffer, mapped. Raises SyncError where the receiver does not see the sender's GPU."""
        index = next((i for i in range(torch.cuda.device_count()) if _uuid(i) == self.device_uuid), None)
        if index is None:
            raise SyncError(f"the weights lie on GPU {self.device_uuid}, which this engine does not see; use sync.transport=nccl")
        arguments = (*self.handle[:DEVICE_ARGUMENT], index, *self.handle[DEVICE_ARGUMENT + 1 :])
        buffer = rebuild_cuda_tensor(*arguments)
        yield buffer
        torch.cuda.current_stream().synchronize()  # copies out of the buffer are done before the sender reuses it


class CudaIpcTransport:
    """Packs each bucket on the sender's GPU."""

    def __init__(self, rank: int, timeout_s: float):
        self._engines: list[EngineHandle] = []

    def start(self, engines: Sequence[EngineHandle]) -> None:
        """Remember the engines."""
        self._engines = list(engines)

    def send(self, bucket: WireBucket, pieces: Sequence[Tensor], receivers: Sequence[int]) -> Delivery:
        """The buffer is held until release."""
        device = torch.device("cuda", torch.cuda.current_device())
        held = [torch.empty(bucket.num_bytes, dtype=torch.uint8, device=device)]
        pack(pieces, held[0])
        torch.cuda.current_stream().synchronize()
        _, handle = reduce_tensor(held[0])
        loaded = replace(bucket, payload=CudaIpcPayload(handle=handle, device_uuid=_uuid(device.index)))
        futures = {index: self._engines[index].receive_bucket.remote(loaded).future() for index in receivers}
        return Delivery(acknowledgements=futures, release=held.clear)

    def finish(self) -> None:
        """Forget the engines."""
        self._engines = []


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
