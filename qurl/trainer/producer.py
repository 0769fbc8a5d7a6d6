"""Producing rollouts: prompts in, scored groups out, never more than max_staleness versions ahead of training.

The staleness invariant, enforced here and nowhere else: the prompts of iteration s are dispatched once version s - max_staleness is
published, and iteration s trains exactly those prompts, in dispatch order. No token trained in iteration s was therefore sampled
from weights older than s - max_staleness. With max_staleness=0 an iteration's prompts start only after the previous update: the
synchronous algorithm. With more, up to max_staleness + 1 iterations are under way, which bounds the buffer.

Producer task: consumes prompts, produces one Batch per iteration, waits for published versions, woken by PublishedWeights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from qurl.types import Prompt, RolloutGroup, ScoredGroup


@dataclass(kw_only=True, slots=True)
class Batch:
    """One iteration's groups, on their way."""

    step: int
    groups: list[asyncio.Task[ScoredGroup]]
    stream_state: dict[str, Any]  # position of the prompt stream before this batch: what a checkpoint at `step` stores
    started: float = field(default_factory=time.monotonic)
    num_sampled: int = 0
    num_scored: int = 0
    last_sampled: float = 0.0  # time.monotonic() of the last group that left the pool
    waiting: dict[str, str] = field(default_factory=dict)  # prompt id -> "rollout" | "reward"

    def cancel(self) -> None:
        """Give up what is still under way."""
        for task in self.groups:
            task.cancel()


class Producer:
    """Keeps the pool busy. take(step) hands out the batches in order."""

    def __init__(
        self,
        *,
        stream: Any,  # qurl.data.PromptStream
        num_prompts_per_step: int,
        max_staleness: int,
        first_step: int,
        num_steps: int,
        wait_for_version: Callable[[int], Awaitable[None]],
        sample: Callable[[Prompt], Awaitable[RolloutGroup]],
        score: Callable[[RolloutGroup], Awaitable[ScoredGroup]],
    ):
        self._stream = stream
        self._num_prompts = num_prompts_per_step
        self._max_staleness = max_staleness
        self._wait_for_version = wait_for_version
        self._sample = sample
        self._score = score
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
        await asyncio.gather(self._task, *(task for batch in self._open for task in batch.groups), return_exceptions=True)

    async def _produce(self, first_step: int, num_steps: int) -> None:
        for step in range(first_step, num_steps):
            await self._wait_for_version(step - self._max_staleness)
            state = self._stream.state_dict()
            prompts = self._stream.take(self._num_prompts)
            batch = Batch(step=step, groups=[], stream_state=state)
            batch.groups = [asyncio.ensure_future(self._one_group(batch, prompt)) for prompt in prompts]
            self._open.append(batch)
            await self._batches.put(batch)

    async def _one_group(self, batch: Batch, prompt: Prompt) -> ScoredGroup:
        batch.waiting[prompt.prompt_id] = "rollout"
        group = await self._sample(prompt)
        batch.num_sampled += 1
        batch.last_sampled = time.monotonic()
        batch.waiting[prompt.prompt_id] = "reward"
        scored = await self._score(group)
        batch.num_scored += 1
        del batch.waiting[prompt.prompt_id]
        return scored
