"""The driver's part of a weight update: who gets it, again if need be, and what it cost.

begin on every engine -> all learner ranks send -> the manifest of all ranks -> commit on every engine. An engine takes up sampling
with its own commit, whatever becomes of the others. Those that reject get the whole update once more, up to `max_retries` times;
those that do not answer are given up at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from qurl.config.sync import SyncConfig
from qurl.observability.metrics import Last, Max, Mean, Metric, Min, Sum
from qurl.sync.protocol import EngineHandle, RemoteResult
from qurl.sync.sender import SendReport, last_line

logger = logging.getLogger(__name__)
LOST = ("ActorDiedError", "ActorUnavailableError", "RayActorError")
"""Ray's words for an engine that answers nothing any more."""


class WeightSource(Protocol):
    """The learner ranks, seen from the driver."""

    async def send_weights(self, version: int, engines: Sequence[EngineHandle], full: bool) -> SendReport:
        """Every rank sends its share of the current weights (WeightSender.send); the merged report (merge_send_reports)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishReport:
    """A finished update."""

    metrics: dict[str, Metric]
    failed_engines: list[EngineHandle]  # do not hold the version and should be replaced
    errors: list[str]  # what each of them raised; "" of one that is lost or did not answer


@dataclass(slots=True)
class _Failures:
    """Engines that failed in one attempt: index -> reason."""

    retriable: dict[int, str] = field(default_factory=dict)
    final: dict[int, str] = field(default_factory=dict)

    def note(self, index: int, error: BaseException) -> None:
        """A silent engine would only keep everyone waiting again."""
        (self.final if isinstance(error, TimeoutError) else self.retriable)[index] = last_line(error)


async def publish(
    version: int,
    source: WeightSource,
    engines: Sequence[EngineHandle],
    *,
    config: SyncConfig | None = None,
    full: bool = False,
) -> PublishReport:
    """Bring engines to `version`. full: for engines that do not hold the version published before.

    config: the run's sync group. Raises SyncError where ranks contradict each other, and what send_weights raises."""
    config = config or SyncConfig()
    pending = list(range(len(engines)))
    given_up: dict[int, str] = {}
    first_report: SendReport | None = None
    install_s, retries = [0.0], 0
    for attempt in range(config.max_retries + 1):
        failures = _Failures()
        taking_part = await _begin(version, engines, pending, failures, config.timeout_s)
        if taking_part:
            retries += len(taking_part) if attempt else 0
            report = await source.send_weights(version, [engines[i] for i in taking_part], full or attempt > 0)
            first_report = first_report or report
            install_s += await _commit(version, engines, taking_part, report, failures, config.timeout_s)
        given_up |= failures.final
        pending = sorted(failures.retriable)
        if not pending:
            break
        logger.warning("version %d was rejected by engines %s", version, failures.retriable)
    given_up |= {index: failures.retriable[index] for index in pending}
    for index, reason in given_up.items():
        logger.error("engine %d does not hold version %d and is given up: %s", index, version, reason)
    metrics = _metrics(version, first_report, max(install_s), retries)
    failed = sorted(given_up)
    errors = [failures.retriable.get(index, "") for index in failed]
    errors = ["" if text.startswith(LOST) else text for text in errors]
    return PublishReport(metrics=metrics, failed_engines=[engines[index] for index in failed], errors=errors)


async def _begin(
    version: int, engines: Sequence[EngineHandle], pending: Sequence[int], failures: _Failures, timeout_s: float
) -> list[int]:
    """Indices of the engines that are waiting for buckets."""
    answers = await _all(timeout_s, [engines[i].begin_weight_update.remote(version) for i in pending])
    return _succeeded(pending, answers, failures)


async def _commit(
    version: int,
    engines: Sequence[EngineHandle],
    taking_part: Sequence[int],
    report: SendReport,
    failures: _Failures,
    timeout_s: float,
) -> list[float]:
    """Commit on the engines that took every bucket; seconds each spent installing."""
    for position, reason in report.failed.items():
        kind = failures.final if position in report.unresponsive else failures.retriable
        kind[taking_part[position]] = reason
    complete = [index for position, index in enumerate(taking_part) if position not in report.failed]
    answers = await _all(timeout_s, [engines[i].commit_weight_update.remote(version, report.records) for i in complete])
    committed = _succeeded(complete, answers, failures)
    return [float(answer) for i, answer in zip(complete, answers, strict=True) if i in committed]


async def _all(timeout_s: float, calls: Sequence[RemoteResult]) -> list[Any]:
    """Results or exceptions, in order; TimeoutError for a call that is not done in time."""
    return await asyncio.gather(*(asyncio.wait_for(_await(call), timeout_s) for call in calls), return_exceptions=True)


async def _await(call: RemoteResult) -> Any:
    return await call


def _succeeded(indices: Sequence[int], answers: Sequence[Any], failures: _Failures) -> list[int]:
    """Indices without an exception; the others are noted."""
    succeeded = []
    for index, answer in zip(indices, answers, strict=True):
        if isinstance(answer, BaseException):
            failures.note(index, answer)
        else:
            succeeded.append(index)
    return succeeded


def _metrics(version: int, report: SendReport | None, install_s: float, retries: int) -> dict[str, Metric]:
    """sync/* of one update. report: of its first attempt, since a second one compares the weights with themselves."""
    metrics: dict[str, Metric] = {
        "sync/install_s": Max(install_s),
        "sync/retry_count": Sum(retries),
        "sync/weight_version": Last(version),
    }
    if report is not None:
        metrics["sync/encode_s"] = Max(report.encode_s)
        metrics["sync/transfer_s"] = Max(report.transfer_s)
        metrics["sync/bytes"] = Last(report.num_bytes)
        if report.num_codes:
            metrics["sync/changed_code_fraction"] = Mean(report.num_changed_codes / report.num_codes, weight=report.num_codes)
        if ratios := report.update_to_noise:
            metrics["quantization/update_to_noise_min"] = Min(min(ratios.values()))
            metrics["quantization/update_to_noise_mean"] = Mean(sum(ratios.values()) / len(ratios), weight=len(ratios))
            metrics |= {f"quantization/update_to_noise/{module}": Last(ratio) for module, ratio in ratios.items()}
        if report.sqnr_min_db is not None:
            metrics["quantization/sqnr_min_db"] = Min(report.sqnr_min_db)
    return metrics
