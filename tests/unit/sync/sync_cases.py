"""Engines and installers that need neither Ray nor vLLM: the real receiver behind handles that look like Ray's."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qurl.config import SyncConfig
from qurl.quantization import FORMATS
from qurl.sync import WeightReceiver, WeightSender

LINEARS = [f"model.layers.{layer}.mlp.{name}" for layer in range(3) for name in ("up_proj", "down_proj")]


class RecordingInstaller:
    """A model that is a dictionary."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.tensors: dict[str, Tensor] = {}

    def begin(self) -> None:
        self.events.append("begin")

    def install(self, tensors) -> None:
        self.events.append("install")
        self.tensors |= {name: tensor.clone() for name, tensor in tensors.items()}

    def finish(self) -> None:
        self.events.append("finish")


class Call:
    """What .remote() of a local engine returns."""

    def __init__(self, future: Future):
        self._future = future

    def future(self) -> Future:
        return self._future

    def __await__(self):
        return asyncio.wrap_future(self._future).__await__()


@dataclass
class Method:
    """A method that runs in the engine's thread."""

    pool: ThreadPoolExecutor
    function: Callable[..., Any]

    def remote(self, *args: Any) -> Call:
        return Call(self.pool.submit(lambda: self.function(*args)))


class LocalEngine:
    """A receiver served by one thread. `tamper` sees each bucket first and may change it, drop it (None) or raise."""

    def __init__(self, tamper: Callable[[Any], Any] | None = None):
        self.installer = RecordingInstaller()
        self.receiver = WeightReceiver(self.installer)
        self.tamper = tamper
        self.buckets: list[Any] = []
        pool = ThreadPoolExecutor(max_workers=1)
        self.begin_weight_update = Method(pool, self.receiver.begin)
        self.receive_bucket = Method(pool, self._receive)
        self.commit_weight_update = Method(pool, lambda *args: self.receiver.commit(*args).install_s)

    def _receive(self, bucket: Any) -> None:
        self.buckets.append(bucket)
        bucket = bucket if self.tamper is None else self.tamper(bucket)
        if bucket is not None:
            self.receiver.receive(bucket)


def die_in_mid_bucket(bucket: Any, device: str = "cpu") -> None:
    """Connect to the sender and end without a word, as an engine does that runs out of memory."""
    if device != "cpu":
        torch.cuda.set_device(device)
    bucket.payload._group({})
    os.kill(os.getpid(), signal.SIGKILL)


class DyingEngine(LocalEngine):
    """An engine in a process that is killed while its first bucket is under way."""

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self._device = device

    def _receive(self, bucket: Any) -> None:
        process = multiprocessing.get_context("spawn").Process(target=die_in_mid_bucket, args=(bucket, self._device))
        process.start()
        process.join()
        raise RuntimeError(f"the actor died (exit code {process.exitcode})")


def local_config(**options: Any) -> SyncConfig:
    """Small buckets over a transport that needs no Ray."""
    return replace(SyncConfig(transport="shared_memory", bucket_bytes=20_000, timeout_s=20.0), **options)


def make_sender(name: str = "int8", rank: int = 0, world_size: int = 1, **options: Any) -> WeightSender:
    return WeightSender(local_config(**options), FORMATS[name], frozenset(LINEARS), torch.bfloat16, rank, world_size)


def make_weights(seed: int = 0) -> dict[str, Tensor]:
    """A model of six linear layers, an embedding and a norm."""
    generator = torch.Generator().manual_seed(seed)
    weights = {f"{name}.weight": torch.randn(48, 128, generator=generator) for name in LINEARS}
    return weights | {"model.embed_tokens.weight": torch.randn(50, 64, generator=generator), "model.norm.weight": torch.ones(64)}


def nudge(weights: dict[str, Tensor], seed: int, fraction: float = 0.02) -> dict[str, Tensor]:
    """The weights after a small update: a few entries move."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(
            torch.rand(w.shape, generator=generator) < fraction, w + 0.05 * torch.randn(w.shape, generator=generator), w
        )
        for name, w in weights.items()
    }


def encoded(weights: dict[str, Tensor], name: str = "int8") -> dict[str, Tensor]:
    """What an engine must hold, computed without the stream."""
    wire: dict[str, Tensor] = {}
    for key, weight in weights.items():
        module = key.removesuffix(".weight")
        if name != "none" and module in LINEARS:
            wire |= {f"{module}.{suffix}": value for suffix, value in FORMATS[name].encode(weight).items()}
        else:
            wire[key] = weight.to(torch.bfloat16)
    return wire


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
        for name, tensor in expected.items()
    )


def update(sender: WeightSender, engine: LocalEngine, version: int, weights: dict[str, Tensor], full: bool = False):
    """One whole update of one engine; the sender's report."""
    engine.begin_weight_update.remote(version).future().result()
    report = sender.send(version, iter(weights.items()), [engine], full=full)
    if report.failed:
        raise AssertionError(report.failed)
    engine.commit_weight_update.remote(version, report.records).future().result()
    return report
