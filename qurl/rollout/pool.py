"""The pool: spreads prompts over engines by load, watches the engines, replaces those that die or hang.

One queue feeds all engines. A prompt is handed to the engine with the fewest samples under way, and only while that engine has
room, so a slow engine takes less and a dead one loses little. A prompt whose engine is lost goes back to the queue under the same
request id and seeds; its future is resolved once, by whichever attempt ends first. Where an engine is lost to an exception that
another one raised before (EngineErrors), a third would not help: the pool ends with that exception.

Watcher task: consumes engine statuses, produces replacements, waits for POLL_S, woken by the clock."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from qurl.config import RolloutConfig
from qurl.errors import GuardStop, one_line, remote_cause
from qurl.rollout.engine import EngineFailed
from qurl.rollout.engine_errors import EngineErrors
from qurl.rollout.request import GenerationRequest, Sampling, sample_seed
from qurl.shared_files import SharedFiles
from qurl.types import Prompt, Rollout, RolloutGroup

logger = logging.getLogger(__name__)

POLL_S = 2.0
ROOM = 1.25  # samples handed to an engine, in multiples of max_num_seqs: the surplus waits inside vLLM and keeps its batch full
STATUS_TIMEOUT_S = 2.0  # an engine that does not say sooner how many tokens it has is not waited for


@dataclass(kw_only=True, slots=True, eq=False)
class _Engine:
    engine_id: str
    handle: Any
    ready: bool = False  # holds the published weights
    load: int = 0  # samples under way
    has_answered: bool = False  # whether it finished any request
    under_way: set[str] = field(default_factory=set)  # request ids
    lost: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(kw_only=True, slots=True)
class _Work:
    request: GenerationRequest
    future: asyncio.Future[list[Rollout]]


class PoolFailed(GuardStop):
    """More engines were lost than rollout.max_engine_restarts allows."""


class EnginesKeepFailing(RuntimeError):
    """Two engines were lost to the same exception, which the message quotes."""


class RolloutPool:
    """Driver side; all methods run on one event loop.

    start_actor: engine id -> Ray actor handle. `refresh(handle, adopt)` sends the published weights to one new engine and calls
    adopt() before another update can begin, so that no engine is left out of one; it raises where the engine fails."""

    def __init__(
        self, config: RolloutConfig, start_actor: Callable[[str], Any], *, run_seed: int, decode: Callable[[list[int]], str]
    ):
        self._config = config
        self._start_actor = start_actor
        self._run_seed = run_seed
        self._decode = decode
        self._engines: list[_Engine] = []
        self._joining: set[_Engine] = set()  # successors that are not yet among _engines
        self._queue: list[_Work] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._room = asyncio.Event()
        self._num_started = 0
        self._failure: PoolFailed | EnginesKeepFailing | None = None
        self._errors = EngineErrors()
        self._closing = False
        self.refresh: Callable[[Any, Callable[[], None]], Awaitable[None]] | None = None
        self.num_restarts = 0
        self._num_redispatched = 0
        self._max_load = int(ROOM * config.max_num_seqs)

    async def start(self, files: SharedFiles | None = None) -> None:
        """Start all engines side by side and wait until they answer. files: what each must see before it loads a model.

        Raises what the first failing one raised."""
        self._engines = await self._started_engines(files)
        self._spawn(self._watch())

    async def restart(self, start_actor: Callable[[str], Any]) -> None:
        """Replace all engines by those that `start_actor` starts, now and later. They wait for weights; prompts under way are
        dispatched again. None of it counts as a loss. Raises what the first failing one raised."""
        _abandon([*self._engines, *self._joining])
        self._engines, self._start_actor = [], start_actor
        self._joining.clear()
        self._engines = await self._started_engines()

    async def set_precision(self, precision: str | Mapping[str, str] | None, start_actor: Callable[[str], Any]) -> None:
        """Have all engines multiply other blocks (quantization=axbxp) and sample again after the next weight update; `start_actor`
        starts engines that do so from now on. Successors on their way make room for such, which is no loss; an engine that does not
        follow is one."""
        self._start_actor = start_actor
        joining, self._joining = self._joining, set()
        _abandon(joining)
        for _ in joining:
            self._start_successor()
        await asyncio.gather(*(self._set_precision(engine, precision) for engine in list(self._engines)))

    async def _set_precision(self, engine: _Engine, precision: str | Mapping[str, str] | None) -> None:
        try:
            await engine.handle.set_precision.remote(precision)
        except RayError as error:
            text = one_line(remote_cause(error))
            self._lose(engine, f"it did not take quantization.precision={precision} ({text})", text)

    async def _started_engines(self, files: SharedFiles | None = None) -> list[_Engine]:
        engines = [self._new_engine() for _ in range(self._config.num_engines)]
        if files is not None:
            await asyncio.gather(*(
                _as_future(engine.handle.look.remote(files, f"engine {engine.engine_id}")) for engine in engines
            ))
        await asyncio.gather(*(_as_future(engine.handle.start.remote()) for engine in engines))
        return engines

    async def close(self) -> None:
        """Stop the tasks and kill the engines."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for engine in self._engines:
            ray.kill(engine.handle)

    @property
    def handles(self) -> list[Any]:
        """Engines that take part in the next weight update."""
        return [engine.handle for engine in self._engines if not engine.lost.is_set()]

    def mark_ready(self, failed: list[Any], errors: Sequence[str] = ()) -> None:
        """Called after a weight update: engines in `failed` are replaced, the others sample. errors: what the first of `failed`
        raised; "" of one that did not answer."""
        texts = [*errors, *[""] * (len(failed) - len(errors))]
        for engine in list(self._engines):
            if engine.handle in failed:
                text = texts[failed.index(engine.handle)]
                self._lose(engine, "it rejected the weight update" + (f": {text}" if text else ""), text)
            else:
                engine.ready = True
        self._dispatch()

    async def generate(self, prompt: Prompt, sampling: Sampling, num_samples: int, *, request_id: str) -> RolloutGroup:
        """Sample a group. request_id: unique among requests under way; names the seeds. Raises PoolFailed, EnginesKeepFailing, or
        what vLLM raises where it refuses the prompt."""
        seeds = [sample_seed(self._run_seed, request_id, index) for index in range(num_samples)]
        request = GenerationRequest(request_id=request_id, token_ids=prompt.token_ids, seeds=seeds, sampling=sampling)
        if self._failure is not None:
            raise self._failure
        work = _Work(request=request, future=asyncio.get_running_loop().create_future())
        self._queue.append(work)
        self._dispatch()
        rollouts = await work.future
        texts = [self._decode(rollout.token_ids) for rollout in rollouts]
        return RolloutGroup(prompt=prompt, rollouts=[replace(r, text=t) for r, t in zip(rollouts, texts, strict=True)])

    def take_redispatched(self) -> int:
        """Prompts dispatched again since the last call."""
        count, self._num_redispatched = self._num_redispatched, 0
        return count

    async def num_tokens(self) -> int:
        """Tokens of the samples that the present engines have finished since they started; of those that answer at once."""
        asked = [asyncio.ensure_future(_as_future(engine.handle.status.remote())) for engine in self._engines]
        done, late = await asyncio.wait(asked, timeout=STATUS_TIMEOUT_S) if asked else (set(), set())
        for each in late:
            each.cancel()
        return sum(each.result().num_tokens for each in done if each.exception() is None)

    def waiting_for(self) -> str:
        """Who everyone waits for, for the stall message."""
        busy = [f"engine {e.engine_id} ({e.load} samples)" for e in self._engines if e.load]
        starting = [f"engine {e.engine_id} (no weights yet)" for e in self._engines if not e.ready]
        return ", ".join(busy + starting + [f"{len(self._queue)} prompts not dispatched"])

    # ---- dispatch ---------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Hand out what is queued, oldest first, to the least loaded engine that has room; to each engine in one call."""
        shares: dict[_Engine, list[_Work]] = {}
        while self._queue and not self._closing:
            if self._queue[0].future.done():  # cancelled by its caller
                self._queue.pop(0)
                continue
            engines = [e for e in self._engines if e.ready and not e.lost.is_set() and e.load < self._max_load]
            if not engines:
                break
            work = self._queue.pop(0)
            engine = min(engines, key=lambda e: e.load)
            engine.load += len(work.request.seeds)
            engine.under_way.add(work.request.request_id)
            shares.setdefault(engine, []).append(work)
        for engine, share in shares.items():
            self._spawn(self._run({work.request.request_id: work for work in share}, engine))

    async def _run(self, share: dict[str, _Work], engine: _Engine) -> None:
        """Wait for an engine's answers to its share; what it leaves when it is lost is queued again."""
        answers = asyncio.ensure_future(self._take_answers(share, engine))
        lost = asyncio.ensure_future(engine.lost.wait())
        try:
            await asyncio.wait({answers, lost}, return_when=asyncio.FIRST_COMPLETED)
            if answers.done() and (error := answers.exception()) is not None:
                self._lose_to(engine, error)
        finally:
            lost.cancel()
            answers.cancel()
            for work in reversed(share.values()):
                engine.under_way.discard(work.request.request_id)
                engine.load -= len(work.request.seeds)
                self._redispatch(work)
            self._dispatch()

    async def _take_answers(self, share: dict[str, _Work], engine: _Engine) -> None:
        """Resolve each work as its answer comes, and forget it."""
        async for reference in engine.handle.generate.remote([work.request for work in share.values()]):
            request_id, answer = await reference
            work = share.pop(request_id)
            engine.has_answered = True
            engine.under_way.discard(request_id)
            engine.load -= len(work.request.seeds)
            if not work.future.done():
                work.future.set_exception(answer) if isinstance(answer, Exception) else work.future.set_result(answer)
            self._dispatch()

    def _redispatch(self, work: _Work) -> None:
        if work.future.done():
            return
        if self._failure is not None:
            work.future.set_exception(self._failure)
            return
        self._num_redispatched += 1
        self._queue.insert(0, work)

    # ---- health -----------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await asyncio.gather(*(self._check(engine) for engine in list(self._engines) if not engine.lost.is_set()))

    async def _check(self, engine: _Engine) -> None:
        limit = self._config.engine_timeout_s
        try:
            status = await asyncio.wait_for(_as_future(engine.handle.status.remote()), timeout=limit)
        except TimeoutError:
            self._lose(engine, f"it did not answer for {limit:g} s")
            return
        except RayError as error:
            self._lose(engine, f"its process died ({type(error).__name__})")
            return
        if status.busy_s > limit:
            self._lose(engine, f"one step has lasted {status.busy_s:.0f} s (rollout.engine_timeout_s={limit:g})")

    def _lose_to(self, engine: _Engine, error: BaseException) -> None:
        """Lose an engine whose answers ended with an error."""
        if isinstance(error, RayActorError):
            self._lose(engine, "its process died")
            return
        cause = remote_cause(error)
        text = cause.cause_text if isinstance(cause, EngineFailed) else one_line(cause)
        self._lose(engine, f"a step raised ({one_line(cause)})", text)

    def _lose(self, engine: _Engine, reason: str, error: str = "") -> None:
        """Kill an engine and start its successor; once per engine. error: the exception that it was lost to, if any."""
        if engine.lost.is_set():
            return
        engine.lost.set()
        engine.ready = False
        if engine in self._engines:
            self._engines.remove(engine)
        ray.kill(engine.handle)
        if error and self._errors.is_repeated(error, is_fresh=not engine.has_answered, under_way=engine.under_way):
            self._fail(EnginesKeepFailing(f"engine {engine.engine_id} was lost: {reason}; an engine before it was lost to the same "
                                          "exception, so another one is not started"))
            return
        self.num_restarts += 1
        if self.num_restarts > self._config.max_engine_restarts:
            self._fail(PoolFailed(f"engine {engine.engine_id} was lost: {reason}; rollout.max_engine_restarts="
                                  f"{self._config.max_engine_restarts} is used up"))
            return
        logger.error("engine %s was lost: %s; starting another", engine.engine_id, reason)
        self._start_successor()

    def _start_successor(self) -> None:
        successor = self._new_engine()
        self._joining.add(successor)
        self._spawn(self._join(successor))

    async def _join(self, engine: _Engine) -> None:
        """Start a successor and have it take over, unless it is abandoned meanwhile."""
        try:
            await engine.handle.start.remote()
            assert self.refresh is not None, "the trainer sets refresh before anything is sampled"
            await self.refresh(engine.handle, lambda: self._adopt(engine))
        except (RayError, RuntimeError) as error:
            text = one_line(remote_cause(error))
            self._lose(engine, f"it did not start ({text})", "" if isinstance(error, RayActorError) else text)
        finally:
            self._joining.discard(engine)

    def _adopt(self, engine: _Engine) -> None:
        self._joining.discard(engine)
        engine.ready = True
        self._engines.append(engine)
        logger.warning("engine %s has taken over", engine.engine_id)
        self._dispatch()

    def _new_engine(self) -> _Engine:
        engine_id = str(self._num_started)
        self._num_started += 1
        return _Engine(engine_id=engine_id, handle=self._start_actor(engine_id))

    def _fail(self, failure: PoolFailed | EnginesKeepFailing) -> None:
        """End with `failure`; engines that are left go on with nothing but weight updates."""
        if self._failure is not None:
            return
        self._failure = failure
        logger.info("%s", failure)  # whoever waits raises it
        for work in self._queue:
            if not work.future.done():
                work.future.set_exception(self._failure)
        self._queue.clear()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _abandon(engines: Iterable[_Engine]) -> None:
    for engine in engines:
        engine.lost.set()
        ray.kill(engine.handle)


async def _as_future(ref: Any) -> Any:
    return await ref


def training_sampling(config: RolloutConfig, stop_token_ids: list[int]) -> Sampling:
    """What training samples with."""
    return Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=config.max_response_tokens,
        stop_token_ids=tuple(sorted({*stop_token_ids, *config.stop_token_ids})),
        returns_kept_tokens=config.cuts,
    )
