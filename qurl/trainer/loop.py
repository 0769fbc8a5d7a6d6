"""The training loop: take a batch, train on it, publish the new weights.

The same loop is synchronous or asynchronous; only the producer knows `max_staleness`. The loop task consumes batches, produces
weight versions, waits for the pool, the learner and the interrupt, woken by whichever comes first."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from qurl.config import TrainConfig
from qurl.errors import GuardStop
from qurl.learner.group import LearnerGroup
from qurl.observability.metrics import Last, Max, Mean, Metric, Sum, reduce_metrics
from qurl.observability.run_logger import RunLogger
from qurl.observability.timeline import Timeline
from qurl.rollout.pool import RolloutPool
from qurl.trainer.batch import check_reward_errors, overlong_metrics, rollout_metrics, spread_out, training_samples
from qurl.trainer.checkpoint import Checkpoints
from qurl.trainer.guard import Guard
from qurl.trainer.interrupt import Interrupted, or_interrupt
from qurl.trainer.producer import Batch, Producer
from qurl.trainer.symptoms import Symptoms
from qurl.trainer.weights import PublishedWeights
from qurl.types import ScoredGroup

logger = logging.getLogger(__name__)
PROGRESS_S = 0.5  # how often the console hears of rollouts under way


@dataclass(kw_only=True)
class TrainingLoop:
    """Everything one run needs, started and ready. `completed` counts finished iterations; it is also the weight version.
    `evaluated` is what `completed` was at the last evaluation; -1: there was none."""

    config: TrainConfig
    learner: LearnerGroup
    pool: RolloutPool
    weights: PublishedWeights
    producer: Producer
    checkpoints: Checkpoints
    log: RunLogger
    timeline: Timeline
    guard: Guard
    interrupt: asyncio.Event
    completed: int
    evaluated: int
    inputs: dict[str, Any]  # fingerprints of what the run is made from (qurl.trainer.inputs), for its checkpoints
    evaluate: Callable[[Callable[[int, int], None]], Coroutine[Any, Any, dict[str, float]]] | None
    check_agreement: Callable[[int], Coroutine[Any, Any, None]] | None = None  # of engines and learner, at a version
    symptoms: Symptoms = field(default_factory=Symptoms)
    _untrained: Batch | None = None

    async def run(self) -> None:
        """Train until num_steps. Raises Interrupted after a checkpoint, GuardStop and RuntimeError where the run cannot go on."""
        self.log.begin(self.completed, self.evaluated)
        try:
            await self._publish(self.completed)
            if self.check_agreement is not None:
                await or_interrupt(self.check_agreement(self.completed), self.interrupt)
            if await self._evaluate_if_due() and self.completed:  # the evaluation that ended the process before this one
                await self.checkpoint()
            await self.weights.announce()
            self.timeline.begin_step(self.completed)
            for step in range(self.completed, self.config.num_steps):
                await self._iteration(step)
                if self.interrupt.is_set():
                    raise Interrupted
        except Interrupted:
            await self.checkpoint()
            raise

    async def _iteration(self, step: int) -> None:
        self._tell_stage(step)
        groups, batch = await self._rollouts(step)
        sampled = batch.sampled()
        check_reward_errors(sampled, self.config.reward.max_error_fraction)
        self.symptoms.look(step, sampled, self.config.rollout_at(step).max_response_tokens)
        reports = [rollout_metrics(sampled, version=step), self._pool_metrics(batch)]
        if self.config.stages:
            reports.append({"rollout/stage": Last(self.config.stage_at(step))})
        if self.config.guard.action.falls_back:
            reports.append({"rollout/fallback": Last(self.guard.fallen_back)})
        if self.config.algorithm.dynamic_sampling.enabled:
            reports.append(self._dynamic_sampling(step, groups, batch))
        async with self.weights.lock:
            reports.append(await self._train(step, groups))
            stop = await self._ask_guard(step, reduce_metrics(reports))
            reports.append(await self._publish(step + 1))
        self.completed, self._untrained = step + 1, None
        self.log.record_rollouts(step, groups)
        self.log.log_step(step, reduce_metrics(reports) | self.timeline.end_step())
        await self._evaluate_if_due()  # after the log: what ends the run here loses no iteration
        await self.weights.announce()  # after the evaluation, which thus has the engines to itself where max_staleness=0
        self.timeline.begin_step(step + 1)
        if stop or self._checkpoint_is_due():  # after the log: a step that it counts is in metrics.jsonl
            await self.checkpoint()
        if stop:
            raise GuardStop(stop)

    def _tell_stage(self, step: int) -> None:
        stage = self.config.stage_at(step)
        if stage and self.config.stages[stage - 1].from_step == step:
            logger.info("iteration %d begins stage %d: %s", step, stage, self.config.stages[stage - 1])

    async def _rollouts(self, step: int) -> tuple[list[ScoredGroup], Batch]:
        with self.timeline.span("rollout"):
            self.log.stage("rollout", 0, self.config.rollout_at(step).num_prompts_per_step)
            batch = await or_interrupt(self.producer.take(step), self.interrupt)
            self._untrained = batch
            async with self._progress(batch):
                groups = await or_interrupt(batch.trained, self.interrupt)
        self.timeline.move("rollout", "reward", max(0.0, time.monotonic() - batch.last_sampled))
        return groups, batch

    async def _train(self, step: int, groups: list[ScoredGroup]) -> dict[str, Metric]:
        self.log.stage("update")
        limit = self.config.rollout_at(step).max_response_tokens
        samples = training_samples(groups, self.config.algorithm, limit)
        if not samples:
            raise GuardStop(f"iteration {step} has nothing to train: every response is empty, without a reward or cut at "
                            f"rollout.max_response_tokens={limit} (algorithm.overlong.filter); raise it, or check the "
                            "prompts and the reward function")  # fmt: skip
        probe = self.config.probe
        metrics = {}
        if self.guard.fallen_back or (probe.every_steps and step % probe.every_steps == 0):
            metrics = await self._timed(self.learner.probe(spread_out(samples, probe.num_samples), version=step))
        trains_policy = step >= self.config.critic.num_warmup_iterations
        trained = await self._timed(self.learner.train_step(samples, trains_policy))
        values = reduce_metrics([trained])
        self.symptoms.tell_skipped(step, values, int(values.get("policy/num_optimizer_steps", 0)))
        metrics |= trained
        return metrics | overlong_metrics(groups, self.config.algorithm.overlong, limit)

    async def _ask_guard(self, step: int, metrics: dict[str, float]) -> str | None:
        """Why the run must stop after this iteration; None: it goes on, from engines as the guard wants them."""
        before = self.guard.fallen_back
        stop = self.guard.judge(step, metrics)
        if self.guard.fallen_back is not before:
            with self.timeline.span("sync"):
                await self.weights.switch(self.guard.fallen_back)
        return stop

    async def _timed(self, work: Awaitable[tuple[dict[str, Metric], dict[str, float]]]) -> dict[str, Metric]:
        """Metrics of a call of the learner's, whose seconds are accounted."""
        start = time.monotonic()
        metrics, timings = await work
        self.timeline.add(start, timings, total=time.monotonic() - start)
        return metrics

    async def _publish(self, version: int) -> dict[str, Metric]:
        self.log.stage("sync")
        with self.timeline.span("sync"):
            return await self.weights.publish(version)

    async def _evaluate_if_due(self) -> bool:
        """Evaluate the published weights, where that is due and was not done. Raises Interrupted; the evaluation is due still."""
        is_due = self.config.evaluation.is_due(self.completed, self.config.num_steps)
        if self.evaluate is None or not is_due or self.evaluated == self.completed:
            return False
        start = time.monotonic()
        with self.timeline.span("eval"):
            evaluation = self.evaluate(lambda done, total: self.log.stage("eval", done, total))
            metrics = await or_interrupt(evaluation, self.interrupt)
        self.timeline.write()
        self.log.log_eval(self.completed, metrics, time.monotonic() - start)
        self.evaluated = self.completed
        return True

    async def checkpoint(self) -> None:
        """Write the state after `completed` iterations; a batch that was not trained is sampled again on resume."""
        self.log.stage("checkpoint")
        stream_state = self._untrained.stream_state if self._untrained else self.producer.stream_state()
        state = {
            "step": self.completed, "evaluated": self.evaluated, "stream": stream_state, "guard": self.guard.state_dict(),
            "logger": self.log.state_dict(), "inputs": self.inputs,
        }  # fmt: skip
        with self.timeline.span("checkpoint"):
            folder = await self.checkpoints.save(self.completed, state, self.learner.save_checkpoint)
        logger.info("checkpoint %s", folder)

    def _pool_metrics(self, batch: Batch) -> dict[str, Metric]:
        tokens = sum(len(rollout.token_ids) for scored in batch.sampled() for rollout in scored.group.rollouts)
        return {
            "rollout/tokens_per_s": Max(tokens / max(1e-9, batch.last_sampled - batch.started)),
            "rollout/redispatched_count": Sum(self.pool.take_redispatched()),
            "rollout/engine_restart_count": Max(self.pool.num_restarts),
        }

    def _dynamic_sampling(self, step: int, groups: list[ScoredGroup], batch: Batch) -> dict[str, Metric]:
        """Metrics; raises GuardStop where no group is informative."""
        found = f"{len(groups)} of {len(batch.groups)} groups in {batch.num_generations} batches"
        if not groups:
            self.log.record_rollouts(step, batch.sampled())
            raise GuardStop(f"iteration {step}: {found} are informative; in each all known rewards are equal, or every response is "
                            "filtered as truncated. Check reward.function on those in rollouts/, take problems that are neither "
                            "too hard nor too easy for the model, or raise rollout.num_samples_per_prompt, "
                            "rollout.max_response_tokens or algorithm.dynamic_sampling.max_generations")  # fmt: skip
        if len(groups) < batch.num_prompts:
            logger.warning("iteration %d trains %d groups instead of %d: only %s were informative; "
                           "algorithm.dynamic_sampling.max_generations allows no more",
                           step, len(groups), batch.num_prompts, found)  # fmt: skip
        return {
            "rollout/num_generations": Last(batch.num_generations),
            "rollout/num_trained_groups": Last(len(groups)),
            "rollout/discarded_fraction": Mean(1 - len(groups) / len(batch.groups), weight=len(batch.groups)),
        }

    def _checkpoint_is_due(self) -> bool:
        every = self.config.checkpoint.every_steps
        return self.completed == self.config.num_steps or (every > 0 and self.completed % every == 0)

    @contextlib.asynccontextmanager
    async def _progress(self, batch: Batch) -> AsyncIterator[None]:
        """Report what is done while waiting for it; after stall_timeout_s without progress say who everyone waits for."""

        async def report() -> None:
            seen, since = (0, 0), time.monotonic()
            limit = self.config.cluster.stall_timeout_s
            while True:
                now = (batch.num_sampled, batch.num_scored)
                self.log.stage("rollout", batch.num_scored, len(batch.groups))
                if now != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > limit:
                    prompt_id, stage = next(iter(batch.waiting.items()), ("none", "none"))
                    logger.warning("no progress for %.0f s in iteration %d: waiting for the %s of %d prompts, first %s; %s",
                                   limit, batch.step, stage, len(batch.waiting), prompt_id, self.pool.waiting_for())  # fmt: skip
                    since = time.monotonic()
                await asyncio.sleep(PROGRESS_S)

        task = asyncio.ensure_future(report())
        try:
            yield
        finally:
            task.cancel()
