"""What a weight update costs: random Qwen2-shaped weights through every format and transport, to one engine in a Ray actor.

The engine verifies and copies in place, as a real one does, into plain tensors. Each round measures every format one after the
other, so that a machine that slows down slows all of them; ratios are medians of ratios within a round."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qurl.actors import portable_errors
from qurl.config.sync import SyncConfig
from qurl.quantization import FORMATS
from qurl.sync import SendReport, WeightReceiver, WeightSender, publish
from qurl.sync.protocol import EngineHandle

BASELINE = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes that decide how many bytes there are; defaults are Qwen2-0.5B's, 0.49B parameters."""

    num_layers: int = 24
    hidden: int = 896
    intermediate: int = 4864
    key_value: int = 128  # features of the key and of the value projection
    vocabulary: int = 151936


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncBenchRow:
    """Medians over rounds for one format and transport."""

    quantization_format: str
    transport: str
    encode_s: float
    transfer_s: float  # that the learner waited beyond encoding
    install_s: float
    total_s: float  # encoding and transfer
    num_bytes: int
    gigabytes_per_s: float  # num_bytes / total_s
    total_ratio: float  # to unquantized weights in the same round and transport; below 1 is faster
    bytes_ratio: float


def run_sync_bench(
    formats: Sequence[str] = (BASELINE, "int8"),
    transports: Sequence[str] = ("object_store", "shared_memory", "gloo"),
    shape: ModelShape | None = None,
    *,
    num_rounds: int = 3,
    bucket_bytes: int = SyncConfig().bucket_bytes,
    device: str = "cpu",
) -> list[SyncBenchRow]:
    """One row per format and transport; the first update of each, which connects and allocates, is not counted.

    Needs a running Ray. Raises ValueError for an unknown format or transport, and without the baseline format `none`."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or BASELINE not in formats or num_rounds < 1:
        raise ValueError(f"formats={list(formats)} must be of {', '.join(FORMATS)} with {BASELINE!r} among them, num_rounds >= 1")
    weights = random_weights(shape or ModelShape(), device)
    rows = []
    for transport in transports:
        config = SyncConfig(transport=transport, bucket_bytes=bucket_bytes)
        targets = frozenset(name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight"))
        senders = {name: WeightSender(config, FORMATS[name], targets, torch.bfloat16, 0, 1) for name in formats}
        engines = {name: _start_engine(device) for name in formats}
        rounds = [
            {name: _update(k, config, senders[name], engines[name], weights) for name in formats} for k in range(num_rounds + 1)
        ]
        rows += [_row(name, transport, rounds[1:]) for name in formats]
        _stop(engines.values())
    return rows


def random_weights(shape: ModelShape, device: str) -> dict[str, Tensor]:
    """bfloat16 weights under Qwen2's names, tied embeddings; layers share memory, which no stage of the stream profits from."""
    generator = torch.Generator(device).manual_seed(0)
    square, narrow = (shape.hidden, shape.hidden), (shape.key_value, shape.hidden)
    wide, tall = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    matrices = {
        "self_attn.q_proj": square, "self_attn.k_proj": narrow, "self_attn.v_proj": narrow, "self_attn.o_proj": square,
        "mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": tall,
    }  # fmt: skip

    def draw(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator, device=device) * 0.02).bfloat16()

    layer = {f"{name}.weight": draw(*size) for name, size in matrices.items()}
    layer |= {f"self_attn.{name}_proj.bias": draw(matrices[f"self_attn.{name}_proj"][0]) for name in "qkv"}
    layer |= {f"{name}.weight": draw(shape.hidden) for name in ("input_layernorm", "post_attention_layernorm")}
    weights = {"model.embed_tokens.weight": draw(shape.vocabulary, shape.hidden), "model.norm.weight": draw(shape.hidden)}
    return weights | {f"model.layers.{k}.{name}": tensor for k in range(shape.num_layers) for name, tensor in layer.items()}


class CopyingInstaller:
    """A model of plain tensors that are copied into in place."""

    def __init__(self, device: str):
        self._device = device
        self._tensors: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Nothing to prepare."""

    def install(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy; the first update allocates."""
        for name, tensor in tensors.items():
            if name not in self._tensors:
                self._tensors[name] = torch.empty_like(tensor, device=self._device)
            self._tensors[name].copy_(tensor)

    def finish(self) -> None:
        """Nothing to complete."""


@portable_errors
class _Engine:
    """A receiver in a Ray actor."""

    def __init__(self, device: str):
        self._receiver = WeightReceiver(CopyingInstaller(device))

    def begin_weight_update(self, version: int) -> None:
        self._receiver.begin(version)

    def receive_bucket(self, bucket: Any) -> None:
        self._receiver.receive(bucket)

    def commit_weight_update(self, version: int, manifest: Any) -> float:
        return self._receiver.commit(version, manifest).install_s


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """A single learner rank in this process."""

    sender: WeightSender
    weights: dict[str, Tensor]

    async def send_weights(self, version: int, engines: Sequence[EngineHandle], full: bool) -> SendReport:
        return await asyncio.to_thread(self.sender.send, version, iter(self.weights.items()), engines, full)


def _start_engine(device: str) -> Any:
    import ray

    return ray.remote(_Engine).options(num_cpus=0, num_gpus=0.1 if device == "cuda" else 0).remote(device)


def _stop(engines: Iterator[Any] | Any) -> None:
    import ray

    for engine in engines:
        ray.kill(engine)


def _update(
    version: int, config: SyncConfig, sender: WeightSender, engine: EngineHandle, weights: dict[str, Tensor]
) -> dict[str, float]:
    """sync/* of one update. Raises RuntimeError where the engine rejected it."""
    report = asyncio.run(publish(version, _Source(sender=sender, weights=weights), [engine], config=config))
    if report.failed_engines:
        raise RuntimeError(f"the engine rejected an update over {config.transport}; the log says why")
    return {key: metric.value for key, metric in report.metrics.items()}


def _row(name: str, transport: str, rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> SyncBenchRow:
    def total(update: Mapping[str, float]) -> float:
        return update["sync/encode_s"] + update["sync/transfer_s"]

    def median(key: str) -> float:
        return statistics.median(updates[name][key] for updates in rounds)

    total_s = statistics.median(total(updates[name]) for updates in rounds)
    num_bytes = int(median("sync/bytes"))
    return SyncBenchRow(
        quantization_format=name,
        transport=transport,
        encode_s=median("sync/encode_s"),
        transfer_s=median("sync/transfer_s"),
        install_s=median("sync/install_s"),
        total_s=total_s,
        num_bytes=num_bytes,
        gigabytes_per_s=num_bytes / total_s / 1e9,
        total_ratio=statistics.median(total(updates[name]) / total(updates[BASELINE]) for updates in rounds),
        bytes_ratio=num_bytes / rounds[0][BASELINE]["sync/bytes"],
    )
