"""The learner's end of the weight stream.

Each rank encodes its share of the weights and sends it, bucket by bucket, to every engine. While engines fetch and install one
bucket the next is encoded; at most `max_inflight_buckets` are under way, so memory stays at a few buckets. An engine that fails
is left out for the rest of the update and reported; the others go on. The iterator of weights is always read to its end, since
gathering ZeRO-3 shards is collective over ranks."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qurl.config.sync import SyncConfig
from qurl.quantization.base import QuantizationFormat
from qurl.quantization.changes import is_code
from qurl.quantization.rounding import rounding_generator
from qurl.sync.bucket import Delta, WireTensor, describe, lay_out
from qurl.sync.code_changes import CodeChanges
from qurl.sync.delta import find_changes, is_smaller_as_delta, num_changes
from qurl.sync.protocol import EngineHandle, SyncError
from qurl.sync.transports import Delivery, Transport, choose_transport, make_transport
from qurl.sync.update_noise import UpdateNoise
from qurl.types import TensorRecord

logger = logging.getLogger(__name__)

SQNR_INTERVAL = 8  # updates between two looks at the error of the same matrix
UNQUANTIZED = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class SendReport:
    """One rank's share of one update, or that of all ranks."""

    records: list[TensorRecord]  # its part of the manifest
    encode_s: float  # reading the weights, encoding, fingerprints
    transfer_s: float  # packing, handing over and waiting for engines
    num_bytes: int  # per engine
    num_changed_codes: int  # quantized codes that differ from the previous version
    num_codes: int  # codes that were compared; 0 in the first update and without sync.track_changes
    update_to_noise: dict[str, float]  # module -> UpdateNoise.ratio; empty in the first update and without sync.track_updates
    sqnr_min_db: float | None  # worst matrix, each measured at the latest SQNR_INTERVAL updates ago; None: no codes
    failed: dict[int, str]  # index of an engine -> why it did not take all buckets
    unresponsive: frozenset[int]  # those of them that did not answer within sync.timeout_s


@dataclass(slots=True)
class _Progress:
    """What accumulates during one update."""

    records: list[TensorRecord] = field(default_factory=list)
    encode_s: float = 0.0
    transfer_s: float = 0.0
    num_bytes: int = 0
    update_to_noise: dict[str, float] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    unresponsive: set[int] = field(default_factory=set)


class WeightSender:
    """Encodes weights and sends them to engines; one per learner rank, kept over the run."""

    def __init__(
        self,
        config: SyncConfig,
        quantization_format: QuantizationFormat,
        targets: frozenset[str],
        wire_dtype: torch.dtype,
        rank: int,
        world_size: int,
        rounding_seed: int | None = None,
    ):
        """targets: modules whose weights are encoded. wire_dtype: of everything else that is floating point, the engine's dtype.
        rounding_seed: round codes stochastically; the same on all ranks. None: to nearest.

        Raises ValueError for options that do not go together."""
        if config.delta and not config.track_changes:
            raise ValueError("sync.delta=true needs the previous codes; set sync.track_changes=true")
        if config.track_changes_interval < 0:
            raise ValueError(f"sync.track_changes_interval={config.track_changes_interval} must be at least 0")
        if config.bucket_bytes <= 0 or config.max_inflight_buckets <= 0:
            given = f"sync.bucket_bytes={config.bucket_bytes} and sync.max_inflight_buckets={config.max_inflight_buckets}"
            raise ValueError(f"{given}: both must be at least 1")
        assert 0 <= rank < world_size
        self._config = config
        self._format = quantization_format
        self._held = quantization_format  # by engines; see set_fallback
        self.targets = targets if quantization_format.name != UNQUANTIZED else frozenset()
        self._wire_dtype = wire_dtype
        self._rank = rank
        self._rounding_seed = rounding_seed
        self._version = 0  # sent last
        self._update_noise = UpdateNoise() if config.track_updates else None
        self._transport: Transport | None = None
        self._code_changes = CodeChanges(config.track_changes_interval) if config.track_changes else None
        self._previous: dict[str, Tensor] = {}  # host copies of all wire tensors, where deltas are sent
        self._previous_version: int | None = None  # None: the copies are of no single version
        self._sqnr_db: dict[str, float] = {}  # module -> latest measurement

    def send(
        self, version: int, tensors: Iterable[tuple[str, Tensor]], engines: Sequence[EngineHandle], full: bool = False
    ) -> SendReport:
        """Send this rank's (Hugging Face name, weight) pairs to engines that have begun the update; returns when all have answered.

        full: send no changes but whole tensors, as an engine needs that did not commit the version sent before.
        Raises SyncError where the transport has no room, ValueError for weights that cannot be encoded."""
        base_version = None if full or not self._config.delta else self._previous_version
        self._previous_version = None
        self._version = version
        if self._code_changes is not None:
            self._code_changes.begin(version)
        progress = _Progress()
        under_way: deque[Delivery] = deque()
        try:
            for index, bucket_tensors in enumerate(self._buckets(version, base_version, tensors, progress)):
                started = time.perf_counter()
                if index == 0:
                    self._start_transport(bucket_tensors, engines)
                receivers = [i for i in range(len(engines)) if i not in progress.failed]
                if receivers:
                    under_way.append(self._send_bucket(version, index, bucket_tensors, receivers))
                while len(under_way) >= self._config.max_inflight_buckets:
                    self._settle(under_way.popleft(), progress)
                progress.num_bytes += sum(tensor.num_bytes for tensor in bucket_tensors)
                progress.transfer_s += time.perf_counter() - started
                del bucket_tensors
            started = time.perf_counter()
            while under_way:
                self._settle(under_way.popleft(), progress)
            progress.transfer_s += time.perf_counter() - started
        finally:
            if self._transport is not None:
                self._transport.finish()
        self._previous_version = version
        return self._report(progress)

    def decoded(self, module: str, weight: Tensor) -> Tensor:
        """What an engine holds of a module's weight once it was sent, decoded; float32 on the CPU."""
        if self._is_encoded(module):
            return self._held.of_layer(module).decode(self._codes(module, weight.detach().float())).float().cpu()
        return weight.detach().to(self._wire_dtype).float().cpu()

    def linear(self, module: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What an engine computes in a module of `targets` once its weight was sent, unless it is in a fallback; [..., O] in x's
        dtype."""
        return self._format.of_layer(module).linear(x, self._codes(module, weight.detach().float()), bias)

    def set_fallback(self, fallback: QuantizationFormat | None) -> None:
        """What engines hold from the next version on; None: the format given at the start, with which `linear` stays.

        The fallback is the format "none", whose versions are sent without encoding, or the same format with another precision,
        which has the same wire. An engine without quantization and one with it cannot follow each other's updates; what changes and
        deltas are told from is then forgotten."""
        held = self._format if fallback is None else fallback
        assert held.name in (UNQUANTIZED, self._format.name)
        changes_wire = held.name != self._held.name
        self._held = held
        self._sqnr_db.clear()
        if not changes_wire:
            return
        self._previous.clear()
        self._previous_version = None
        if self._code_changes is not None:
            self._code_changes.forget()
        if self._update_noise is not None:
            self._update_noise = UpdateNoise()

    @property
    def is_fallen_back(self) -> bool:
        """Whether engines hold something else than the format given at the start."""
        return self._held is not self._format

    # ---- encoding ---------------------------------------------------------------------------------------------------

    def _is_encoded(self, module: str) -> bool:
        return module in self.targets and self._held.name != UNQUANTIZED

    def _buckets(
        self, version: int, base_version: int | None, tensors: Iterable[tuple[str, Tensor]], progress: _Progress
    ) -> Iterator[list[WireTensor]]:
        """Wire tensors, at most bucket_bytes at a time; those of one weight stay together, in a bucket of their own if need be."""
        content: list[WireTensor] = []
        size = 0
        started = time.perf_counter()
        for position, (name, tensor) in enumerate(tensors):
            group = [
                self._wire_tensor(wire_name, wire, base_version, progress)
                for wire_name, wire in self._encode(name, tensor, (position + version) % SQNR_INTERVAL == 0, progress).items()
            ]
            group_size = sum(wire.num_bytes for wire in group)
            if content and size + group_size > self._config.bucket_bytes:
                progress.encode_s += time.perf_counter() - started
                yield content
                started = time.perf_counter()
                content, size = [], 0
            content += group
            size += group_size
        progress.encode_s += time.perf_counter() - started
        if content:
            yield content

    def _encode(self, name: str, tensor: Tensor, measure: bool, progress: _Progress) -> dict[str, Tensor]:
        """Wire tensors by full name. measure: look at this weight's error again."""
        module, _, parameter = name.rpartition(".")
        if parameter != "weight" or not self._is_encoded(module):
            return {name: tensor.detach().to(self._wire_dtype) if tensor.is_floating_point() else tensor.detach()}
        weight = tensor.detach().float()
        wire = self._codes(module, weight)
        if measure or module not in self._sqnr_db or self._update_noise is not None:
            decoded = self._held.of_layer(module).decode(wire)
            self._sqnr_db[module] = _sqnr_db(weight, decoded)
            if self._update_noise is not None and (ratio := self._update_noise.ratio(module, weight, decoded)) is not None:
                progress.update_to_noise[module] = ratio
        return {f"{module}.{suffix}": value for suffix, value in wire.items()}

    def _codes(self, module: str, weight: Tensor) -> dict[str, Tensor]:
        """What `module` is sent as in the current version, by suffix."""
        format = self._format.of_layer(module)
        if self._rounding_seed is None:
            return format.encode(weight)
        generator = rounding_generator(self._rounding_seed, self._version, module, weight.device)
        return format.encode_stochastically(weight, generator)

    def _wire_tensor(self, name: str, tensor: Tensor, base_version: int | None, progress: _Progress) -> WireTensor:
        """Ready to travel, whole or as changes; remembers it for the next update."""
        record = describe(name, tensor)
        progress.records.append(record)
        if self._code_changes is not None and is_code(name, tensor):
            self._code_changes.see(name, tensor)
        whole = WireTensor(record=record, pieces=(tensor,), delta=None)
        if not self._config.delta:
            return whole
        previous, on_host = self._previous.get(name), tensor.cpu()
        if previous is None or previous.shape != tensor.shape or previous.dtype != tensor.dtype:
            self._previous[name] = on_host.clone()
            return whole
        changes = num_changes(previous, on_host)
        wire = whole
        if base_version is not None and is_smaller_as_delta(tensor, changes):
            delta = Delta(base_version=base_version, num_changes=changes)
            wire = WireTensor(record=record, pieces=find_changes(previous, on_host), delta=delta)
        if changes:
            previous.copy_(on_host)
        return wire

    # ---- sending ----------------------------------------------------------------------------------------------------

    def _start_transport(self, first: Sequence[WireTensor], engines: Sequence[EngineHandle]) -> None:
        if self._transport is None:
            device = first[0].pieces[0].device.type
            name = choose_transport(self._config.transport, device=device, colocate=False)
            self._transport = make_transport(name, self._rank, self._config.timeout_s)
        self._transport.start(engines)

    def _send_bucket(self, version: int, index: int, tensors: Sequence[WireTensor], receivers: Sequence[int]) -> Delivery:
        assert self._transport is not None
        bucket, pieces = lay_out(tensors, version=version, sender_rank=self._rank, index=index, keep_base=self._config.delta)
        return self._transport.send(bucket, pieces, receivers)

    def _settle(self, delivery: Delivery, progress: _Progress) -> None:
        """Wait until every engine has answered, except those that did not answer before; notes failures."""
        awaited = {i: answer for i, answer in delivery.acknowledgements.items() if i not in progress.unresponsive}
        wait(awaited.values(), timeout=self._config.timeout_s)
        for index, answer in awaited.items():
            if not answer.done():
                progress.unresponsive.add(index)
                reason = f"no answer to a bucket within sync.timeout_s={self._config.timeout_s:g}"
            elif (error := answer.exception()) is not None:
                reason = last_line(error)
            else:
                continue
            if index not in progress.failed:
                progress.failed[index] = reason
                logger.warning("engine %d dropped out of the weight update: %s", index, reason)
        delivery.release()

    def _report(self, progress: _Progress) -> SendReport:
        return SendReport(
            records=progress.records,
            encode_s=progress.encode_s,
            transfer_s=progress.transfer_s,
            num_bytes=progress.num_bytes,
            num_changed_codes=0 if self._code_changes is None else self._code_changes.num_changed(),
            num_codes=0 if self._code_changes is None else self._code_changes.num_codes,
            update_to_noise=progress.update_to_noise,
            sqnr_min_db=min(self._sqnr_db.values(), default=None),
            failed=progress.failed,
            unresponsive=frozenset(progress.unresponsive),
        )


def last_line(error: BaseException) -> str:
    """The error in one line; Ray puts the remote traceback before it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def merge_send_reports(reports: Sequence[SendReport]) -> SendReport:
    """All ranks' shares as one update: the slowest rank's seconds, everything else added up.

    Raises SyncError where two ranks sent the same tensor or none sent any."""
    records = [record for report in reports for record in report.records]
    twice = sorted(name for name, count in Counter(record.name for record in records).items() if count > 1)
    if twice:
        raise SyncError(f"{len(twice)} tensors were sent by more than one rank ({', '.join(twice[:3])})")
    if not records:
        raise SyncError("the learner sent no weights")
    return SendReport(
        records=records,
        encode_s=max(report.encode_s for report in reports),
        transfer_s=max(report.transfer_s for report in reports),
        num_bytes=sum(report.num_bytes for report in reports),
        num_changed_codes=sum(report.num_changed_codes for report in reports),
        num_codes=sum(report.num_codes for report in reports),
        update_to_noise={module: ratio for report in reports for module, ratio in report.update_to_noise.items()},
        sqnr_min_db=min((report.sqnr_min_db for report in reports if report.sqnr_min_db is not None), default=None),
        failed={index: reason for report in reports for index, reason in report.failed.items()},
        unresponsive=frozenset().union(*(report.unresponsive for report in reports)),
    )


def _sqnr_db(weight: Tensor, decoded: Tensor) -> float:
    """10 log10(|W|^2 / |W - V|^2), dB; inf where the copy is exact."""
    noise = float(torch.linalg.vector_norm(weight - decoded.to(weight.device)))
    return 20.0 * math.log10(float(torch.linalg.vector_norm(weight)) / noise) if noise else math.inf
