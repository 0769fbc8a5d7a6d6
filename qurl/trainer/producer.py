"""Producing rollouts: prompts in, scored groups out, never more than max_staleness versions ahead of training.

The staleness invariant, enforced here and nowhere else: the prompts of iteration s are dispatched once version s - max_staleness is
published, and iteration s trains exactly those prompts, in dispatch order. No token trained in iteration s was therefore sampled
from weights older than s - max_staleness. With max_staleness=0 an iteration's prompts start only after the previous update: the
synchronous algorithm. With more, up to max_staleness + 1 iterations are under way, which bounds the buffer.

With dynamic sampling an iteration samples batch after batch until enough of its groups are informative. Which groups it trains,
and where in the prompt stream it ends, depends on their rewards alone and on no timing: it trains the first informative ones in
dispatch order, and samples another batch exactly where those before it hold too few. The next iteration begins in the stream where
this one ended, so its prompts are dispatched once this one is complete; sampling still overlaps with training, but no longer with
the last responses of the iteration before.

Producer task: consumes prompts, produces one Batch per iteration, waits for published versions, woken by PublishedWeights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qurl.config import DynamicSamplingConfig
from qurl.types import Prompt, RolloutGroup, ScoredGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicSampling:
    """What the producer must know to replace uninformative groups."""

    config: DynamicSamplingConfig
    is_informative: Callable[[ScoredGroup], bool]
    check: Callable[[Sequence[ScoredGroup]], None]  # called before another batch is sampled; raises where that would be in vain


@dataclass(kw_only=True, slots=True)
class Batch:
    """One iteration's groups, on their way."""

    step: int
    num_prompts: int  # groups to train
    stream_state: dict[str, Any]  # position of the prompt stream before this batch: what a checkpoint at `step` stores
    groups: list[asyncio.Task[ScoredGroup]] = field(default_factory=list)  # sampled or under way, in dispatch order
    trained: asyncio.Task[list[ScoredGroup]] = field(init=False)  # in dispatch order; fewer than num_prompts where the bound is hit
    num_generations: int = 0
    started: float = field(default_factory=time.monotonic)
    num_sampled: int = 0
    num_scored: int = 0
    last_sampled: float = 0.0  # time.monotonic() of the last group that left the pool
    waiting: dict[str, str] = field(default_factory=dict)  # prompt id -> "rollout" | "reward"

    def sampled(self) -> list[ScoredGroup]:
        """All groups, trained or not; only once `trained` is done."""
        return [task.result() for task in self.groups]

    def cancel(self) -> None:
        """Give up what is still under way."""
        for task in (self.trained, *self.groups):
            task.cancel()


class Producer:
    """Keeps the pool busy. take(step) hands out the batches in order."""

    def __init__(
        self,
        *,
        stream: Any,  # qurl.data.PromptStream
        num_prompts_per_step: Callable[[int], int],  # of an iteration
        max_staleness: int,
        first_step: int,
        num_steps: int,
        wait_for_version: Callable[[int], Awaitable[None]],
        sample: Callable[[Prompt, int], Awaitable[RolloutGroup]],  # prompt and the iteration that trains it
        score: Callable[[RolloutGroup], Awaitable[ScoredGroup]],
        dynamic_sampling: DynamicSampling | None = None,
    ):
        self._stream = stream
        self._num_prompts = num_prompts_per_step
        self._max_staleness = max_staleness
        self._wait_for_version = wait_for_version
        self._sample = sample
        self._score = score
        self._dynamic = dynamic_sampling
        self._batches: asyncio.Queue[Batch] = asyncio.Queue()
        self._open: list[Batch] = []  # dispatched, not yet taken
        self._task = asyncio.ensure_future(self._produce(first_step, num_steps))

    async def take(self, step: int) -> Batch:
        """The batch of iteration `step`, as soon as it is dispatched; its groups may still be under way."""
        getter = asyncio.ensure_future(self._batches.get())
        await asyncio.wait({getter, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not getter.done() and self._batches.empty():
            getter.cancel()
            self._task.result()  # raises what ended the producer
        batch = await getter
        assert batch.step == step, "iterations are taken in the order in which they were dispatched"
        self._open.remove(batch)
        return batch

    def stream_state(self) -> dict[str, Any]:
        """Position of the prompt stream before the first batch that was not taken: resuming there repeats and skips nothing."""
        return self._open[0].stream_state if self._open else self._stream.state_dict()

    async def close(self) -> None:
        """Stop producing and give up what is under way."""
        self._task.cancel()
        for batch in self._open:
            batch.cancel()
        under_way = [task for batch in self._open for task in (batch.trained, *batch.groups)]
        await asyncio.gather(self._task, *under_way, return_exceptions=True)

    async def _produce(self, first_step: int, num_steps: int) -> None:
        for step in range(first_step, num_steps):
            await self._wait_for_version(step - self._max_staleness)
            batch = Batch(step=step, num_prompts=self._num_prompts(step), stream_state=self._stream.state_dict())
            self._dispatch(batch)
            batch.trained = asyncio.ensure_future(self._collect(batch))
            self._open.append(batch)
            await self._batches.put(batch)
            if self._dynamic is not None:
                await asyncio.wait({batch.trained})
                if batch.trained.cancelled() or batch.trained.exception() is not None:
                    return  # whoever takes the batch hears of it

    def _dispatch(self, batch: Batch) -> set[asyncio.Task[ScoredGroup]]:
        """Start the groups of the next prompts of the stream."""
        at_a_time = self._dynamic.config.num_prompts_per_generation if self._dynamic else None
        prompts = self._stream.take(at_a_time or batch.num_prompts)
        started = [asyncio.ensure_future(self._one_group(batch, prompt)) for prompt in prompts]
        batch.groups += started
        batch.num_generations += 1
        return set(started)

    async def _collect(self, batch: Batch) -> list[ScoredGroup]:
        """The groups to train. Where one fails, or the caller gives up, none of the others goes on."""
        try:
            if self._dynamic is None:
                return await asyncio.gather(*batch.groups)
            return await self._collect_informative(batch, self._dynamic)
        finally:
            for task in batch.groups:
                task.cancel()
            await asyncio.gather(*batch.groups, return_exceptions=True)

    async def _collect_informative(self, batch: Batch, dynamic: DynamicSampling) -> list[ScoredGroup]:
        """Another batch is dispatched as soon as it is certain to be needed, while the one before it is still under way."""
        found: set[asyncio.Task[ScoredGroup]] = set()
        waiting = set(batch.groups)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            found |= {task for task in done if dynamic.is_informative(task.result())}
            is_short = len(found) + len(waiting) < batch.num_prompts
            if is_short and batch.num_generations < dynamic.config.max_generations:
                dynamic.check([task.result() for task in batch.groups if task.done()])
                waiting |= self._dispatch(batch)
        return [task.result() for task in batch.groups if task in found][: batch.num_prompts]

    async def _one_group(self, batch: Batch, prompt: Prompt) -> ScoredGroup:
        batch.waiting[prompt.prompt_id] = "rollout"
        group = await self._sample(prompt, batch.step)
        batch.num_sampled += 1
        batch.last_sampled = time.monotonic()
        batch.waiting[prompt.prompt_id] = "reward"
        scored = await self._score(group)
        batch.num_scored += 1
        del batch.waiting[prompt.prompt_id]
        return scored
