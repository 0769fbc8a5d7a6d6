"""The pool's dispatch and replacement, over fake engines that behave as Ray actor handles do."""

import asyncio
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RayActorError, RayError

from qurl.config import RolloutConfig
from qurl.rollout import pool as pool_module
from qurl.rollout.engine import EngineFailed, EngineStatus
from qurl.rollout.pool import EnginesKeepFailing, PoolFailed, RolloutPool
from qurl.rollout.request import Sampling, sample_seed
from qurl.types import Prompt, Rollout

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=4, stop_token_ids=(1,))


class Method:
    def __init__(self, function):
        self.remote = lambda *args: asyncio.ensure_future(function(*args))


class FakeEngine:
    """Answers when released; dies or hangs on request."""

    def __init__(self, engine_id: str):
        self.engine_id = engine_id
        self.requests = []
        self.release = asyncio.Event()
        self.dead = asyncio.Event()
        self.busy_s = 0.0
        self.answers = True
        self.raises = None  # text of what its step raises
        self.generate = SimpleNamespace(remote=self._generate)
        self.start = self.status = Method(self._status)
        self.precisions = []
        self.refuses = False
        self.set_precision = Method(self._set_precision)

    async def _generate(self, requests):
        self.requests += requests
        for request in requests:
            yield self._answer(request)

    async def _answer(self, request):
        waits = {asyncio.ensure_future(self.release.wait()), asyncio.ensure_future(self.dead.wait())}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if self.dead.is_set():
            raise RayActorError
        if self.raises is not None:
            raise EngineFailed(self.raises, self.engine_id, "host")
        return request.request_id, [
            Rollout(sample_index=i, token_ids=[5, 1], rollout_logprobs=[-1.0, -2.0], weight_versions=[0, 0], finish_reason="stop",
                    text="", engine_id=self.engine_id, seed=seed)
            for i, seed in enumerate(request.seeds)
        ]  # fmt: skip

    async def _status(self):
        if self.dead.is_set():
            raise RayActorError
        if not self.answers:
            await asyncio.Event().wait()
        return EngineStatus(engine_id=self.engine_id, pid=1, num_running=len(self.requests), num_tokens=0, busy_s=self.busy_s,
                            weight_version=0, waiting_for=[])  # fmt: skip


    async def _set_precision(self, precision):
        if self.dead.is_set():
            raise RayActorError
        if self.refuses:
            raise RayError("its graphs have been captured")
        self.precisions.append(precision)


def prompt(name: str) -> Prompt:
    return Prompt(prompt_id=name, token_ids=[2, 3], text="q", ground_truth="a", data_source="d")


class Bench:
    """A started pool with its fake engines, all holding weights."""

    def __init__(self, monkeypatch, **config):
        self.engines: list[FakeEngine] = []
        self.refreshed: list[str] = []
        monkeypatch.setattr(ray, "kill", lambda handle: handle.dead.set())
        monkeypatch.setattr(pool_module, "POLL_S", 0.01)
        self.pool = RolloutPool(RolloutConfig(**config), self._start, run_seed=7, decode=lambda ids: " ".join(map(str, ids)))
        self.pool.refresh = self._refresh

    def _start(self, engine_id):
        self.engines.append(FakeEngine(engine_id))
        return self.engines[-1]

    async def _refresh(self, handle, adopt):
        self.refreshed.append(handle.engine_id)
        adopt()

    async def __aenter__(self):
        await self.pool.start()
        self.pool.mark_ready([])
        return self

    async def __aexit__(self, *_):
        await self.pool.close()

    def ask(self, name: str, samples: int = 2):
        return asyncio.ensure_future(self.pool.generate(prompt(name), SAMPLING, samples, request_id=name))


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


def test_prompts_go_to_the_engine_with_the_fewest_samples_under_way(monkeypatch):
    async def scenario():
        async with Bench(monkeypatch, num_engines=2) as bench:
            work = [bench.ask("big", 8), bench.ask("a", 2), bench.ask("b", 2), bench.ask("c", 2)]
            await until(lambda: sum(len(e.requests) for e in bench.engines) == 4)
            assert [r.request_id for r in bench.engines[0].requests] == ["big"]
            assert [r.request_id for r in bench.engines[1].requests] == ["a", "b", "c"]
            for engine in bench.engines:
                engine.release.set()
            groups = await asyncio.gather(*work)
            assert [len(g.rollouts) for g in groups] == [8, 2, 2, 2]
            assert groups[0].rollouts[0].text == "5 1"

    asyncio.run(scenario())


def test_an_engine_takes_no_more_than_it_has_room_for(monkeypatch):
    async def scenario():
        async with Bench(monkeypatch, num_engines=1, engine_args={"max_num_seqs": 4}) as bench:
            work = [bench.ask(str(i), 2) for i in range(6)]
            await until(lambda: len(bench.engines[0].requests) == 3)  # 5 samples of room: a third group still begins below it
            bench.engines[0].release.set()
            await asyncio.gather(*work)
            assert sorted(r.request_id for r in bench.engines[0].requests) == [str(i) for i in range(6)]

    asyncio.run(scenario())


def test_the_prompts_of_a_dead_engine_are_dispatched_again_with_the_same_seeds(monkeypatch):
    async def scenario():
        async with Bench(monkeypatch, num_engines=1) as bench:
            work = [bench.ask("a"), bench.ask("b")]
            await until(lambda: len(bench.engines[0].requests) == 2)
            bench.engines[0].dead.set()
            await until(lambda: len(bench.engines) == 2 and len(bench.engines[1].requests) == 2)
            bench.engines[1].release.set()
            groups = await asyncio.gather(*work)
            assert [g.prompt.prompt_id for g in groups] == ["a", "b"]
            assert {r.engine_id for g in groups for r in g.rollouts} == {"1"}
            before = {r.request_id: r.seeds for r in bench.engines[0].requests}
            assert {r.request_id: r.seeds for r in bench.engines[1].requests} == before
            assert bench.refreshed == ["1"]
            assert bench.pool.num_restarts == 1
            assert bench.pool.take_redispatched() == 2
            assert bench.pool.take_redispatched() == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("fault", ["hanging step", "no answer"])
def test_a_hanging_engine_is_replaced(monkeypatch, fault):
    async def scenario():
        async with Bench(monkeypatch, num_engines=1, engine_timeout_s=0.05) as bench:
            work = bench.ask("a")
            await until(lambda: len(bench.engines[0].requests) == 1)
            if fault == "hanging step":
                bench.engines[0].busy_s = 1.0
            else:
                bench.engines[0].answers = False
            await until(lambda: len(bench.engines) == 2)
            bench.engines[1].release.set()
            group = await work
            assert {r.engine_id for r in group.rollouts} == {"1"}
            assert bench.engines[0].dead.is_set()

    asyncio.run(scenario())


def test_a_late_answer_of_a_lost_engine_is_not_counted_twice(monkeypatch):
    async def scenario():
        async with Bench(monkeypatch, num_engines=1, engine_timeout_s=0.05) as bench:
            monkeypatch.setattr(ray, "kill", lambda handle: None)  # it goes on living
            work = bench.ask("a")
            await until(lambda: len(bench.engines[0].requests) == 1)
            bench.engines[0].busy_s = 1.0
            await until(lambda: len(bench.engines) == 2 and len(bench.engines[1].requests) == 1)
            bench.engines[0].release.set()
            bench.engines[1].release.set()
            group = await work
            assert len(group.rollouts) == 2 and {r.engine_id for r in group.rollouts} == {"1"}

    asyncio.run(scenario())


def test_engines_that_reject_an_update_are_replaced_and_sample_nothing(monkeypatch):
    async def scenario():
        async with Bench(monkeypatch, num_engines=2) as bench:
            bench.pool.mark_ready([bench.engines[0]])
            work = [bench.ask("a"), bench.ask("b")]
            await until(lambda: len(bench.engines) == 3)
            for engine in bench.engines:
                engine.release.set()
            await asyncio.gather(*work)
            assert bench.engines[0].requests == []

    asyncio.run(scenario())


def test_the_pool_gives_up_after_max_engine_restarts(monkeypatch):
    async def scenario():
        async with Bench(monkeypatch, num_engines=1, max_engine_restarts=1) as bench:
            work = bench.ask("a")
            for index in range(2):
                await until(lambda index=index: len(bench.engines) > index and len(bench.engines[index].requests) == 1)
                bench.engines[index].dead.set()
            with pytest.raises(PoolFailed, match="max_engine_restarts=1"):
                await work
            with pytest.raises(PoolFailed):
                await bench.ask("b")

    asyncio.run(scenario())


def test_a_step_that_raises_sends_the_prompts_to_another_engine_at_once(monkeypatch, caplog):
    async def scenario():
        async with Bench(monkeypatch, num_engines=1) as bench:
            work = [bench.ask("a"), bench.ask("b")]
            await until(lambda: len(bench.engines[0].requests) == 2)
            bench.engines[0].raises = "RuntimeError: out of memory (2.5 GiB)"
            bench.engines[0].release.set()
            await until(lambda: len(bench.engines) == 2 and len(bench.engines[1].requests) == 2)
            bench.engines[1].release.set()
            groups = await asyncio.gather(*work)
            assert {r.engine_id for g in groups for r in g.rollouts} == {"1"} and bench.pool.num_restarts == 1

    asyncio.run(scenario())
    raised = "engine 0 on host: RuntimeError: out of memory (2.5 GiB)"
    assert f"engine 0 was lost: a step raised ({raised}); starting another" in caplog.text


@pytest.mark.parametrize("num_engines", [1, 2])
def test_the_same_exception_from_a_fresh_engine_ends_the_run_with_its_message(monkeypatch, num_engines):
    async def scenario():
        async with Bench(monkeypatch, num_engines=num_engines) as bench:
            started = bench._start

            def start(engine_id):
                fake = started(engine_id)
                fake.raises = f"ValueError: no kernel for heads of 16 at 0x7f{engine_id}"
                fake.release.set()
                return fake

            await bench.pool.restart(start)
            bench.pool.mark_ready([])
            with pytest.raises(EnginesKeepFailing, match="ValueError: no kernel for heads of 16") as raised:
                await asyncio.gather(bench.ask("a"), bench.ask("b"))
            assert not isinstance(raised.value, PoolFailed)  # a guard's exit code would be another one
            assert bench.pool.num_restarts == 1
            with pytest.raises(EnginesKeepFailing):
                await bench.ask("c")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("second", "same_prompt", "ends"), [("KeyError: 1", True, True), ("KeyError: 2", False, False), ("OSError", True, False)]
)
def test_an_engine_that_has_worked_is_replaced_unless_one_prompt_breaks_every_engine(monkeypatch, second, same_prompt, ends):
    async def scenario():
        async with Bench(monkeypatch, num_engines=1) as bench:
            poison = bench.ask("poison")
            await until(lambda: bench.engines[0].requests)
            bench.engines[0].raises = "KeyError: 0"
            bench.engines[0].release.set()
            await until(lambda: len(bench.engines) == 2 and bench.engines[1].requests)
            if same_prompt:
                bench.pool._engines[0].has_answered = True
            else:
                bench.engines[1].release.set()
                await poison
                bench.engines[1].release.clear()
                poison = bench.ask("other")
                await until(lambda: len(bench.engines[1].requests) == 2)
            bench.engines[1].raises = second
            bench.engines[1].release.set()
            if ends:
                with pytest.raises(EnginesKeepFailing):
                    await poison
                return
            await until(lambda: len(bench.engines) == 3 and bench.engines[2].requests)
            bench.engines[2].release.set()
            assert (await poison).rollouts[0].engine_id == "2" and bench.pool.num_restarts == 2

    asyncio.run(scenario())


def test_successors_that_reject_the_same_update_end_the_run(monkeypatch):
    async def scenario():
        async with Bench(monkeypatch, num_engines=1) as bench:

            async def refresh(handle, adopt):
                raise RuntimeError("SyncError: the update brings 'x', which is no parameter")

            bench.pool.refresh = refresh
            work = bench.ask("a")
            await until(lambda: bench.engines[0].requests)
            bench.pool.mark_ready(bench.pool.handles, ["SyncError: the update brings 'x', which is no parameter"])
            with pytest.raises(EnginesKeepFailing, match="the update brings 'x'"):
                await work
            assert len(bench.engines) == 2

    asyncio.run(scenario())


def test_a_restart_replaces_every_engine_and_loses_no_prompt(monkeypatch):
    async def scenario():
        async with Bench(monkeypatch, num_engines=2) as bench:
            work = [bench.ask("a"), bench.ask("b")]
            await until(lambda: all(engine.requests for engine in bench.engines))
            others = []

            def start_other(engine_id):
                others.append(FakeEngine(engine_id))
                others[-1].release.set()
                return others[-1]

            await bench.pool.restart(start_other)
            assert all(engine.dead.is_set() for engine in bench.engines) and len(others) == 2
            assert bench.pool.handles == others and not any(engine.requests for engine in others)  # they have no weights yet
            bench.pool.mark_ready([])
            groups = await asyncio.gather(*work)
            assert {r.engine_id for g in groups for r in g.rollouts} <= {"2", "3"}
            assert bench.pool.num_restarts == 0 and bench.pool.take_redispatched() == 2
            others[0].dead.set()
            await until(lambda: len(others) == 3 and len(bench.pool.handles) == 2)  # the watcher replaces it by one of its kind
            assert len(bench.engines) == 2

    asyncio.run(scenario())


def test_a_successor_that_is_still_starting_does_not_join_after_a_restart(monkeypatch):
    async def scenario():
        async with Bench(monkeypatch, num_engines=1) as bench:
            may_refresh = asyncio.Event()

            async def refresh(handle, adopt):
                await may_refresh.wait()  # as for the lock that the caller of restart holds
                if handle.dead.is_set():
                    raise RuntimeError("the new engine rejected the published weights")
                adopt()

            bench.pool.refresh = refresh
            bench.engines[0].dead.set()
            await until(lambda: len(bench.engines) == 2)
            await bench.pool.restart(bench._start)
            may_refresh.set()
            await asyncio.sleep(0.05)
            assert bench.pool.handles == [bench.engines[2]] and len(bench.engines) == 3
            assert bench.pool.num_restarts == 1

    asyncio.run(scenario())


def test_another_precision_keeps_engines_and_prompts_and_replaces_one_that_does_not_follow(monkeypatch):
    async def scenario():
        async with Bench(monkeypatch, num_engines=3) as bench:
            work = [bench.ask(name) for name in "abc"]
            await until(lambda: all(engine.requests for engine in bench.engines))
            others = []

            def start_other(engine_id):
                others.append(FakeEngine(engine_id))
                return others[-1]

            bench.engines[1].refuses = True
            await bench.pool.set_precision("k4-w2-a2", start_other)
            assert [engine.precisions for engine in bench.engines] == [["k4-w2-a2"], [], ["k4-w2-a2"]]
            assert bench.engines[1].dead.is_set() and bench.pool.num_restarts == 1
            await until(lambda: len(bench.pool.handles) == 3)
            assert bench.pool.handles == [bench.engines[0], bench.engines[2], *others] and others[0].precisions == []
            for engine in bench.pool.handles:
                engine.release.set()
            groups = await asyncio.gather(*work)
            assert {rollout.engine_id for group in (groups[0], groups[2]) for rollout in group.rollouts} == {"0", "2"}
            assert bench.pool.take_redispatched() == 1

    asyncio.run(scenario())


def test_a_successor_that_is_still_starting_makes_room_for_one_with_the_other_precision(monkeypatch):
    async def scenario():
        async with Bench(monkeypatch, num_engines=1) as bench:
            may_refresh = asyncio.Event()

            async def refresh(handle, adopt):
                await may_refresh.wait()  # as for the lock that the caller of set_precision holds
                if handle.dead.is_set():
                    raise RuntimeError("the new engine rejected the published weights")
                adopt()

            bench.pool.refresh = refresh
            bench.engines[0].dead.set()
            await until(lambda: len(bench.engines) == 2)
            others = []

            def start_other(engine_id):
                others.append(FakeEngine(engine_id))
                return others[-1]

            await bench.pool.set_precision(None, start_other)
            may_refresh.set()
            await until(lambda: bool(bench.pool.handles))
            await asyncio.sleep(0.05)
            assert bench.pool.handles == others and len(others) == 1 and len(bench.engines) == 2
            assert bench.engines[1].dead.is_set() and bench.engines[1].precisions == [] and bench.pool.num_restarts == 1

    asyncio.run(scenario())


def test_seeds_differ_between_samples_prompts_and_runs_and_repeat_otherwise():
    seeds = {sample_seed(run, name, index) for run in (0, 1) for name in ("a", "b") for index in range(4)}
    assert len(seeds) == 16
    assert sample_seed(0, "a", 1) == sample_seed(0, "a", 1)
    assert all(0 <= seed < 2**31 for seed in seeds)
