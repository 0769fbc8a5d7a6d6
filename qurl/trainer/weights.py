"""Who holds which weights: the one place that moves them from the learner to the pool."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import torch

from qurl.config import QuantizationConfig, SyncConfig
from qurl.learner.group import LearnerGroup
from qurl.observability.metrics import Metric
from qurl.rollout.pool import RolloutPool
from qurl.sync.publisher import publish

logger = logging.getLogger(__name__)


class PublishedWeights:
    """Version that the pool samples from, and the lock under which learner and pool change together.

    The learner trains and publishes under the lock; a replaced engine is brought up to date under the same lock. So an engine
    only ever receives weights of the published version, and none that joins is left out of the next update."""

    def __init__(
        self,
        config: SyncConfig,
        learner: LearnerGroup,
        pool: RolloutPool,
        engine_starter: Callable[[QuantizationConfig], Callable[[str], Any]],
        quantization: QuantizationConfig,
        fallback: QuantizationConfig | None,
    ):
        """engine_starter: what starts engines of the pool, by their quantization: the configured one, or the fallback of guard."""
        self.version = -1  # nothing published yet
        self._announced = -1
        self.lock = asyncio.Lock()
        self.changed = asyncio.Condition()
        self._config = config
        self._learner = learner
        self._pool = pool
        self._engine_starter = engine_starter
        self._quantization = quantization
        self._fallback = fallback
        pool.refresh = self.refresh

    async def publish(self, version: int) -> dict[str, Metric]:
        """Send the learner's weights to every engine as `version`; the caller holds the lock. Engines that reject are replaced."""
        handles = self._pool.handles
        report = await publish(version, self._learner, handles, config=self._config)
        failed = report.failed_engines + await self._audit(version, [h for h in handles if h not in report.failed_engines])
        self.version = version
        self._pool.mark_ready(failed, report.errors)
        return report.metrics

    async def switch(self, fallen_back: bool) -> None:
        """Have the pool sample with the fallback of guard, or as configured again, from the next `publish` on; the caller holds the
        lock. A running engine has kernels and memory for one format alone: where the fallback has another, each makes way for
        another engine; where it differs in precision, engines live on."""
        assert self._fallback is not None
        await self._learner.set_fallback(self._fallback if fallen_back else None)
        quantization = self._fallback if fallen_back else self._quantization
        start_actor = self._engine_starter(quantization)
        if self._fallback.format == self._quantization.format:
            await self._pool.set_precision(quantization.precision, start_actor)
        else:
            await self._pool.restart(start_actor)

    async def announce(self) -> None:
        """Let the producer hear of the published version."""
        async with self.changed:
            self._announced = self.version
            self.changed.notify_all()

    async def _audit(self, version: int, engines: list[Any]) -> list[Any]:
        """Decode what the engines really hold of sync.audit_layers matrices, other ones after every update, and compare with what
        the learner sent. Returns the engines that hold something else."""
        count = self._config.audit_layers
        if not count:
            return []
        expected = await self._learner.decoded_weights(version * count, count)
        failed = []
        for engine in engines:
            held = await engine.read_back.remote(list(expected))
            wrong = [name for name, weight in expected.items() if not torch.equal(held[name], weight)]
            if wrong:
                logger.error("audit: after update %d an engine holds other weights than were sent: %s", version, ", ".join(wrong))
                failed.append(engine)
        return failed

    async def refresh(self, engine: Any, adopt: Callable[[], None]) -> None:
        """Bring one new engine to the published version. Raises RuntimeError where it rejects it."""
        async with self.lock:
            if self.version >= 0:
                report = await publish(self.version, self._learner, [engine], config=self._config, full=True)
                if report.failed_engines:
                    raise RuntimeError(report.errors[0] or "it did not answer while the published weights were sent")
            adopt()

    async def wait_for(self, version: int) -> None:
        """Return once `version` or a later one is announced."""
        async with self.changed:
            await self.changed.wait_for(lambda: self._announced >= version)
