"""Point-to-point links of torch.distributed between a sender and each engine: gloo on CPUs, NCCL between GPUs.

A link is a process group of two that is built directly on a TCPStore of the sender, independent of any default group, when the
first bucket is sent. It is kept between updates and built anew after any failure. The sender serves each engine from a thread of
its own: announce the bucket, send, wait for the acknowledgement. An engine that runs several workers needs one of the other
transports."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from qurl.sync.bucket import WireBucket, pack
from qurl.sync.protocol import EngineHandle, SyncError
from qurl.sync.transports.base import Delivery

SENDER, RECEIVER = 0, 1

NCCL_ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2"}
"""Of learner ranks and engines: a transfer that fails is cleaned up (2) and reported. By default (3) torch ends the process, so an
engine that dies would take the learner rank that sends to it along."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkPayload:
    """A bucket that the sender is about to send through a link."""

    backend: str  # "gloo" | "nccl"
    host: str
    port: int
    sender: str  # unique per sending process and transport
    key: str  # unique per link
    tag: int
    num_bytes: int
    timeout_s: float

    @contextmanager
    def open(self, links: dict[str, Any]) -> Iterator[Tensor]:
        """Receive the bytes. Raises SyncError where the sender is gone or silent."""
        buffer = torch.empty(self.num_bytes, dtype=torch.uint8, device=_device(self.backend))
        try:
            group = self._group(links)
            group.recv([buffer], SENDER, self.tag).wait()
        except RuntimeError as error:  # torch.distributed has no narrower class in common
            if (link := links.pop(self.sender, None)) is not None:
                link[1].abort()
            raise SyncError(f"{self.backend} link to the sender at {self.host}:{self.port} failed: {error}") from error
        _synchronize(self.backend)
        yield buffer
        _synchronize(self.backend)  # whatever reads the buffer is done before it is freed

    def _group(self, links: dict[str, Any]) -> Any:
        key, group = links.get(self.sender, (None, None))
        if key != self.key:
            store = dist.TCPStore(self.host, self.port, is_master=False, timeout=timedelta(seconds=self.timeout_s))
            group = _connect(self.backend, dist.PrefixStore(self.key, store), RECEIVER, self.timeout_s)
            links[self.sender] = (self.key, group)
        return group


class LinkTransport:
    """One link per engine."""

    backend: str

    def __init__(self, rank: int, timeout_s: float):
        self._timeout_s = timeout_s
        self._sender = f"rank{rank}-{uuid.uuid4().hex}"
        self._host = _own_address()
        self._store: dist.TCPStore | None = None
        self._links: dict[EngineHandle, _Link] = {}
        self._engines: list[EngineHandle] = []

    def start(self, engines: Sequence[EngineHandle]) -> None:
        """Keep links that work, drop those that broke or whose engine is gone. Engines are connected with their first bucket."""
        if self._store is None:
            self._store = dist.TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        self._engines = list(engines)
        for engine, link in list(self._links.items()):
            if link.is_broken or engine not in engines:
                self._links.pop(engine).close()
        for engine in engines:
            if engine not in self._links:
                self._links[engine] = _Link(self.backend, self._store, engine, self._timeout_s)

    def send(self, bucket: WireBucket, pieces: Sequence[Tensor], receivers: Sequence[int]) -> Delivery:
        """The buffer lives until the last link has let go of it."""
        assert self._store is not None, "start() comes first"
        buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=_device(self.backend))
        pack(pieces, buffer)
        _synchronize(self.backend)
        payload = partial(
            LinkPayload, backend=self.backend, host=self._host, port=self._store.port, sender=self._sender, tag=bucket.index,
            num_bytes=bucket.num_bytes, timeout_s=self._timeout_s,
        )  # fmt: skip
        futures = {index: self._links[self._engines[index]].deliver(bucket, payload, buffer) for index in receivers}
        return Delivery(acknowledgements=futures, release=lambda: None)

    def finish(self) -> None:
        """Links stay."""
        self._engines = []


class GlooTransport(LinkTransport):
    """Over TCP. GLOO_SOCKET_IFNAME chooses the interface."""

    backend = "gloo"


class NcclTransport(LinkTransport):
    """Between GPUs. Sender and engine must be on different devices."""

    backend = "nccl"


class _Link:
    """The sender's end of a link, served by one thread."""

    def __init__(self, backend: str, store: dist.TCPStore, engine: EngineHandle, timeout_s: float):
        self.is_broken = False
        self._backend = backend
        self._store: Any = store  # torch's types know no clone()
        self._engine = engine
        self._timeout_s = timeout_s
        self._key = uuid.uuid4().hex
        self._device = _device(backend)
        self._group: Any = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"qurl-{backend}-link")

    def deliver(self, bucket: WireBucket, payload: Callable[..., LinkPayload], buffer: Tensor):
        """A future that is done with the engine's acknowledgement."""
        return self._thread.submit(self._deliver, replace(bucket, payload=payload(key=self._key)), buffer)

    def close(self) -> None:
        """Let go of the thread, once it is idle, and of the group."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._group = None

    def _abort(self) -> None:
        """End what is under way in the group: with NCCL a send to an engine that is gone would stay queued on the device and
        block it until the timeout of the group."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def _deliver(self, bucket: WireBucket, buffer: Tensor) -> None:
        if self.is_broken:
            raise SyncError(f"the {self._backend} link broke earlier in this update")
        self.is_broken = True  # until this bucket is through
        if self._backend == "nccl":
            torch.cuda.set_device(self._device)
        acknowledgement = self._engine.receive_bucket.remote(bucket).future()
        try:
            if self._group is None:
                store = self._store.clone()  # a connection that waits for its engine lets no other thread through
                self._group = _connect(self._backend, dist.PrefixStore(self._key, store), SENDER, self._timeout_s)
            sending = self._group.send([buffer], RECEIVER, bucket.index)
            acknowledgement.result(timeout=self._timeout_s)
            sending.wait()
        except BaseException:
            self._abort()
            raise
        self.is_broken = False


def _connect(backend: str, store: dist.Store, rank: int, timeout_s: float) -> Any:
    """A process group of two. Raises RuntimeError where the other side does not come within timeout_s."""
    timeout = timedelta(seconds=timeout_s)
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, 2, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, 2, options)


def _device(backend: str) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


def _synchronize(backend: str) -> None:
    if backend == "nccl":
        torch.cuda.current_stream().synchronize()


def _own_address() -> str:
    """Where engines reach this process: Ray's address of the node."""
    import ray

    return ray.util.get_node_ip_address() if ray.is_initialized() else "127.0.0.1"
