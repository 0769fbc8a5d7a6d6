"""The loop's order of events, over fakes that write down what is asked of them."""

import asyncio
import logging

import pytest

from qurl.config import TrainConfig
from qurl.errors import GuardStop
from qurl.observability.metrics import Mean
from qurl.observability.timeline import Timeline
from qurl.trainer import loop as loop_module
from qurl.trainer.checkpoint import Checkpoints
from qurl.trainer.loop import Interrupted, TrainingLoop
from qurl.trainer.producer import Producer
from qurl.types import Prompt, RewardResult, Rollout, RolloutGroup, ScoredGroup


class Stream:
    def __init__(self):
        self.taken = 0

    def take(self, n):
        self.taken += n
        names = [f"p{number}" for number in range(self.taken - n, self.taken)]
        return [Prompt(prompt_id=name, token_ids=[1], text="", ground_truth="", data_source="") for name in names]

    def state_dict(self):
        return {"taken": self.taken}


class World:
    """Learner, pool, weights and log at once; `events` is what happened, in order."""

    def __init__(self, tmp_path, *, fail_rewards=False, hold=None, num_steps=3, **changes):
        self.events: list[str] = []
        self.logged: list[dict[str, float]] = []
        self.num_restarts = 0
        self.lock = asyncio.Lock()
        self.version = -1
        self.announced = asyncio.Condition()
        self.hold = hold
        self.fail_rewards = fail_rewards
        self.config = TrainConfig(num_steps=num_steps)
        self.config.rollout.num_prompts_per_step = 2
        self.config.checkpoint.every_steps = 2
        self.config.evaluation.every_steps = 2
        for key, value in changes.items():
            setattr(self.config.cluster, key, value)
        self.interrupt = asyncio.Event()
        self.producer = Producer(stream=Stream(), num_prompts_per_step=2, max_staleness=0, first_step=0, num_steps=num_steps,
                                 wait_for_version=self.wait_for, sample=self.sample, score=self.score)  # fmt: skip
        self.checkpoints = Checkpoints(tmp_path, keep_last=2)
        self.loop = TrainingLoop(
            config=self.config, learner=self, pool=self, weights=self, producer=self.producer, checkpoints=self.checkpoints,
            log=self, timeline=Timeline(tmp_path / "timeline.json"), interrupt=self.interrupt, completed=0, evaluate=self.evaluate,
        )  # fmt: skip

    async def sample(self, prompt):
        self.events.append(f"sample {prompt.prompt_id} with {self.version}")
        if self.hold is not None:
            await self.hold.wait()
        rollouts = [
            Rollout(sample_index=i, token_ids=[1], rollout_logprobs=[-1.0], weight_versions=[self.version], finish_reason="stop",
                    text="", engine_id="0", seed=i) for i in range(2)
        ]  # fmt: skip
        return RolloutGroup(prompt=prompt, rollouts=rollouts)

    async def score(self, group):
        results = [RewardResult(value=None, error="timeout after 10 s") if self.fail_rewards else RewardResult(value=float(i))
                   for i in range(2)]  # fmt: skip
        return ScoredGroup(group=group, rewards=results)

    async def train_step(self, samples):
        assert self.lock.locked()
        self.events.append(f"train {len(samples)}")
        return {"policy/loss": Mean(0.5)}, {"time/update_s": 0.0}

    async def publish(self, version):
        self.events.append(f"publish {version}")
        self.version = version
        return {}

    async def announce(self):
        async with self.announced:
            self.announced.notify_all()
            self.heard = self.version

    async def wait_for(self, version):
        async with self.announced:
            await self.announced.wait_for(lambda: getattr(self, "heard", -1) >= version)

    async def save_checkpoint(self, folder):
        self.events.append("save")
        (folder / "w").write_text("")

    async def evaluate(self, progress):
        self.events.append("evaluate")
        return {"eval/d/avg_at_k": 1.0}

    def log_step(self, step, metrics):
        self.events.append(f"log {step}")
        self.logged.append(dict(metrics))

    def log_eval(self, step, metrics): ...
    def record_rollouts(self, step, groups): ...
    def stage(self, name, done=None, total=None): ...
    def state_dict(self): return {}
    def take_redispatched(self): return 0
    def waiting_for(self): return "engine 0 (4 samples)"


def test_each_version_is_published_before_it_samples_and_logged_before_it_is_saved(tmp_path):
    async def scenario():
        world = World(tmp_path)
        await world.loop.run()
        await world.producer.close()
        assert world.events == [
            "publish 0", "evaluate", "sample p0 with 0", "sample p1 with 0", "train 4", "publish 1", "log 0",
            "sample p2 with 1", "sample p3 with 1", "train 4", "publish 2", "evaluate", "log 1", "save",
            "sample p4 with 2", "sample p5 with 2", "train 4", "publish 3", "evaluate", "log 2", "save",
        ]  # fmt: skip
        assert world.logged[1]["eval/d/avg_at_k"] == 1.0 and world.logged[0]["policy/loss"] == 0.5
        assert world.checkpoints.state(world.checkpoints.latest()) == {"step": 3, "stream": {"taken": 6}, "logger": {}}

    asyncio.run(scenario())


def test_an_interrupt_while_sampling_saves_what_is_trained_and_will_sample_the_same_prompts_again(tmp_path):
    async def scenario():
        world = World(tmp_path, hold=asyncio.Event())
        run = asyncio.ensure_future(world.loop.run())
        while "sample p1 with 0" not in world.events:
            await asyncio.sleep(0)
        world.interrupt.set()
        with pytest.raises(Interrupted):
            await run
        await world.producer.close()
        assert world.events[-1] == "save"
        assert world.checkpoints.state(world.checkpoints.latest()) == {"step": 0, "stream": {"taken": 0}, "logger": {}}

    asyncio.run(scenario())


def test_failing_rewards_stop_the_run_before_anything_is_trained(tmp_path):
    async def scenario():
        world = World(tmp_path, fail_rewards=True)
        with pytest.raises(GuardStop, match="4 of 4 reward calls failed.*timeout after 10 s"):
            await world.loop.run()
        await world.producer.close()
        assert not any(event.startswith("train") for event in world.events)

    asyncio.run(scenario())


def test_a_stall_names_the_stage_the_prompt_and_the_engine(tmp_path, monkeypatch, caplog):
    async def scenario():
        monkeypatch.setattr(loop_module, "PROGRESS_S", 0.01)
        world = World(tmp_path, hold=asyncio.Event(), stall_timeout_s=0.03)
        run = asyncio.ensure_future(world.loop.run())
        async with asyncio.timeout(5):
            while "no progress" not in caplog.text:
                await asyncio.sleep(0.01)
        world.interrupt.set()
        with pytest.raises(Interrupted):
            await run
        await world.producer.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert "iteration 0: waiting for the rollout of 2 prompts, first p0; engine 0 (4 samples)" in caplog.text
