"""A run that a signal hits at a chosen point: the real loop, logger, checkpoints, prompts and producer around a learner and engines
that are a few numbers, so that a run takes milliseconds and no production code knows of faults.

A point is a stage of an iteration (a rollout, a reward, the update, ...) or whatever changes a file of the run folder: a file
opened for writing, renamed or removed, a folder made. The latter come from audit events of Python: no way to write is left out."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from qurl.config import LoggingConfig, TrainConfig
from qurl.config.data import DatasetConfig
from qurl.data import PromptStream
from qurl.observability.metrics import Last, Mean
from qurl.observability.run_logger import RunLogger
from qurl.observability.timeline import Timeline
from qurl.trainer.checkpoint import Checkpoints
from qurl.trainer.guard import Guard
from qurl.trainer.interrupt import Interrupted, held_signals, on_signal
from qurl.trainer.loop import TrainingLoop
from qurl.trainer.producer import Producer
from qurl.trainer.run import _evaluated, _evaluation_is_left
from qurl.types import Prompt, RewardResult, Rollout, RolloutGroup, ScoredGroup

WRITES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "shutil.rmtree"}


def in_child(scenario: Callable[..., None], *arguments) -> None:
    """Call it in a forked process, where audit events and signals concern nobody else. Fails as it fails."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        logging.getLogger().handlers.clear()  # pytest's
        try:
            scenario(*arguments)
        except BaseException:
            os.write(writer, traceback.format_exc()[-8000:].encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        failure = told.read()
    os.waitpid(pid, 0)
    assert not failure, failure


class Points:
    """The points that runs in `folder` pass, from 1. `action` is called at each, with its number."""

    def __init__(self, folder: Path):
        self._folder = str(folder)
        self.passed: list[str] = []
        self.action: Callable[[int], None] | None = None
        self._is_acting = False
        sys.addaudithook(self._audit)

    def __call__(self, name: str) -> None:
        self.passed.append(name)
        if self.action is not None:
            self._is_acting = True
            self.action(len(self.passed))
            self._is_acting = False

    def _audit(self, event: str, arguments: tuple) -> None:
        is_write = event in WRITES or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa+"))
        if is_write and not self._is_acting and str(arguments[0]).startswith(self._folder):
            self(f"{event} {os.path.basename(str(arguments[0]))}")


def run(folder: Path, config: TrainConfig, points: Points, action: Callable[[int], None] | None = None) -> int:
    """The exit code that `qurl train` would have. action: of `points`."""
    points.passed, points.action = [], action
    try:
        with held_signals():
            asyncio.run(_train(folder, config, points))
    except (Interrupted, KeyboardInterrupt):
        return 130
    return 0


def hit(index: int, number: signal.Signals) -> Callable[[int], None]:
    """An action: the signal at the point with that number."""
    return lambda passed: os.kill(os.getpid(), number) if passed == index else None


def run_and_kill(folder: Path, config: TrainConfig, points: Points, index: int) -> int:
    """Kill -9, in earnest, at the point with that number. Returns the exit code, 0 where the run ended before that point."""
    if (pid := os.fork()) == 0:
        run(folder, config, points, hit(index, signal.SIGKILL))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


async def _train(folder: Path, config: TrainConfig, point: Points) -> None:
    """As qurl.trainer.run does it, without Ray."""
    checkpoints = Checkpoints(folder, config.checkpoint.keep_last)
    newest = checkpoints.latest()
    state = checkpoints.state(newest) if newest else None
    completed, evaluated = 0, -1
    world = World(config, point)
    prompts = [
        Prompt(prompt_id=f"r{i}", token_ids=[1], text="", ground_truth="", data_source="") for i in range(5)
    ]  # fewer than two iterations take: epochs end in the middle of an iteration
    stream = PromptStream(prompts, seed=0, shuffle=True)
    if state is not None:
        if state["step"] == config.num_steps and not _evaluation_is_left(config, state):
            return
        completed, evaluated = state["step"], _evaluated(state)
        stream.load_state_dict(state["stream"])
        world.weights = int((newest / "weights").read_text())
    log = RunLogger(folder, LoggingConfig(console=False, num_rollouts_per_step=1), config.num_steps, {})
    interrupt = asyncio.Event()
    on_signal(interrupt)
    producer = Producer(
        stream=stream, num_prompts_per_step=lambda step: 3, max_staleness=config.rollout.max_staleness, first_step=completed,
        num_steps=config.num_steps, wait_for_version=world.wait_for, sample=world.sample, score=world.score,
    )  # fmt: skip
    loop = TrainingLoop(
        config=config, learner=world, pool=world, weights=world, producer=producer, checkpoints=checkpoints, log=log,
        timeline=Timeline(folder / "timeline.json"), guard=Guard(config.guard), interrupt=interrupt, completed=completed,
        evaluated=evaluated, evaluate=world.evaluate, inputs={},
    )  # fmt: skip
    try:
        await loop.run()
    finally:
        await producer.close()
        log.close()


async def turns() -> None:
    """Give the event loop more turns than a signal takes to be heard, so that it is heard here and not after the stage."""
    for _ in range(8):
        await asyncio.sleep(0)


class World:
    """Learner, engines and weights. `weights` depends on every sample trained so far, so no other history has the same numbers."""

    num_restarts = 0

    def __init__(self, config: TrainConfig, point):
        self.point = point
        self.weights = 1
        self.published = 0  # what the engines hold
        self.version = self.announced = -1
        self.lock = asyncio.Lock()
        self.changed = asyncio.Condition()

    async def sample(self, prompt: Prompt, step: int) -> RolloutGroup:
        self.point("rollout")
        draw = random.Random(f"{prompt.prompt_id}/{self.published}")
        version, tokens = self.version, [[draw.randrange(9)] for _ in range(2)]
        await turns()
        rollouts = [
            Rollout(sample_index=i, token_ids=ids, rollout_logprobs=[-1.0], weight_versions=[version], finish_reason="stop",
                    text=str(ids), engine_id="0", seed=i) for i, ids in enumerate(tokens)
        ]  # fmt: skip
        return RolloutGroup(prompt=prompt, rollouts=rollouts)

    async def score(self, group: RolloutGroup) -> ScoredGroup:
        self.point("reward")
        await turns()
        return ScoredGroup(group=group, rewards=[RewardResult(value=float(r.token_ids[0])) for r in group.rollouts])

    async def probe(self, samples, version):
        self.point("probe")
        return {"mismatch/quantization_kl": Mean(self.weights % 97)}, {"time/probe_s": 0.0}

    async def train_step(self, samples, trains_policy):
        self.point("update")
        for sample in samples:
            self.weights = (self.weights * 31 + hash((sample.token_ids[-1], sample.weight_version))) % 1_000_003
        await turns()
        self.point("after the update")
        return {"policy/loss": Mean(self.weights)}, {"time/update_s": 0.0}

    async def publish(self, version):
        self.point("sync")
        await turns()
        self.published, self.version = self.weights, version
        return {"sync/weight_version": Last(version)}

    async def announce(self):
        async with self.changed:
            self.announced = self.version
            self.changed.notify_all()

    async def wait_for(self, version):
        async with self.changed:
            await self.changed.wait_for(lambda: self.announced >= version)

    async def evaluate(self, progress):
        self.point("evaluation begins")
        value = self.published
        await turns()
        self.point("evaluation goes on")
        await turns()
        return {"eval/held_out/avg_at_k": float(value)}

    async def save_checkpoint(self, folder: Path):
        self.point("checkpoint")
        (folder / "weights").write_text(str(self.weights))
        return {}

    def take_redispatched(self) -> int:
        return 0

    def waiting_for(self) -> str:
        return "nobody"


def small_run(num_steps: int = 3, max_staleness: int = 0) -> TrainConfig:
    """Evaluations and checkpoints that fall together, apart, and at the end."""
    config = TrainConfig(num_steps=num_steps)
    config.data.eval = {"held_out": DatasetConfig(path="x")}
    config.rollout.max_staleness = max_staleness
    config.evaluation.every_steps = 1
    config.checkpoint.every_steps, config.checkpoint.keep_last = 2, 1
    config.probe.every_steps = 2
    return config
