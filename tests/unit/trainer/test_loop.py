"""The loop's order of events, over fakes that write down what is asked of them."""

import asyncio
import logging
from dataclasses import replace

import pytest

from qurl.config import GuardAction, GuardConfig, StageConfig, TrainConfig
from qurl.errors import GuardStop
from qurl.observability.metrics import Mean
from qurl.observability.timeline import Timeline
from qurl.trainer import loop as loop_module
from qurl.trainer.checkpoint import Checkpoints
from qurl.trainer.guard import Guard
from qurl.trainer.loop import Interrupted, TrainingLoop
from qurl.trainer.producer import Producer
from qurl.trainer.run import _dynamic_sampling
from qurl.types import Prompt, RewardResult, Rollout, RolloutGroup, ScoredGroup

OFF = {"fallen_back": False, "num_clean": 0}  # the guard's state


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

    def __init__(self, tmp_path, *, fail_rewards=False, hold=None, num_steps=3, dynamic=False, equal=(), stages=(), guard=None,
                 **changes):
        self.events: list[str] = []
        self.logged: list[dict[str, float]] = []
        self.evaluations: dict[int, dict[str, float]] = {}
        self.num_restarts = 0
        self.lock = asyncio.Lock()
        self.version = -1
        self.announced = asyncio.Condition()
        self.hold = hold
        self.fail_rewards = fail_rewards
        self.config = TrainConfig(num_steps=num_steps, stages=list(stages))
        self.config.rollout.num_prompts_per_step = 2
        self.config.checkpoint.every_steps = 2
        self.config.evaluation.every_steps = 2
        for key, value in changes.items():
            setattr(self.config.cluster, key, value)
        self.config.algorithm.dynamic_sampling.enabled = dynamic
        self.config.algorithm.dynamic_sampling.max_generations = 2
        self.equal = equal  # prompts whose rewards are
        self.config.guard = guard or GuardConfig()
        self.kl = [0.001] * num_steps  # mismatch/kl_rollout_old of each iteration, and what a probe finds
        self.interrupt = asyncio.Event()
        self.producer = Producer(
            stream=Stream(), num_prompts_per_step=lambda step: self.config.rollout_at(step).num_prompts_per_step, max_staleness=0,
            first_step=0, num_steps=num_steps, wait_for_version=self.wait_for, sample=self.sample, score=self.score,
            dynamic_sampling=_dynamic_sampling(self.config),
        )  # fmt: skip
        self.checkpoints = Checkpoints(tmp_path, keep_last=2)
        self.loop = TrainingLoop(
            config=self.config, learner=self, pool=self, weights=self, producer=self.producer, checkpoints=self.checkpoints,
            log=self, timeline=Timeline(tmp_path / "timeline.json"), guard=Guard(self.config.guard), interrupt=self.interrupt,
            completed=0, evaluated=-1, evaluate=self.evaluate, inputs={},
        )  # fmt: skip

    async def sample(self, prompt, step):
        self.events.append(f"sample {prompt.prompt_id} with {self.version}")
        if self.hold is not None:
            await self.hold.wait()
        rollouts = [
            Rollout(sample_index=i, token_ids=[1], rollout_logprobs=[-1.0], weight_versions=[self.version], finish_reason="stop",
                    text="", engine_id="0", seed=i) for i in range(2)
        ]  # fmt: skip
        return RolloutGroup(prompt=prompt, rollouts=rollouts)

    async def score(self, group):
        values = [1.0, 1.0] if group.prompt.prompt_id in self.equal else [0.0, 1.0]
        results = [RewardResult(value=None, error="timeout after 10 s") if self.fail_rewards else RewardResult(value=value)
                   for value in values]  # fmt: skip
        return ScoredGroup(group=group, rewards=results)

    async def train_step(self, samples, trains_policy):
        assert self.lock.locked()
        self.events.append(f"train {len(samples)}" if trains_policy else "train the critic")
        return {"policy/loss": Mean(0.5), "mismatch/kl_rollout_old": Mean(self.kl[self.version])}, {"time/update_s": 0.0}

    async def probe(self, samples, version):
        assert self.lock.locked() and version == self.version
        self.events.append(f"probe {len(samples)}")
        return {"mismatch/quantization_kl": Mean(self.kl[version])}, {"time/probe_s": 0.0}

    async def switch(self, fallen_back):
        assert self.lock.locked()
        self.events.append("fall back" if fallen_back else "return")

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
        return {}

    async def evaluate(self, progress):
        self.events.append("evaluate")
        return {"eval/d/avg_at_k": 1.0}

    def log_step(self, step, metrics):
        self.events.append(f"log {step}")
        self.logged.append(dict(metrics))

    def begin(self, completed, evaluated): ...
    def log_eval(self, step, metrics, seconds): self.evaluations[step] = metrics
    def record_rollouts(self, step, groups): self.recorded = [scored.group.prompt.prompt_id for scored in groups]
    def stage(self, name, done=None, total=None): ...
    def state_dict(self): return {}
    def take_redispatched(self): return 0
    def waiting_for(self): return "engine 0 (4 samples)"


def saved_state(world):
    return world.checkpoints.state(world.checkpoints.latest())


def test_each_version_is_published_before_it_samples_and_logged_before_it_is_saved(tmp_path):
    async def scenario():
        world = World(tmp_path)
        await world.loop.run()
        await world.producer.close()
        assert world.events == [
            "publish 0", "evaluate", "sample p0 with 0", "sample p1 with 0", "train 4", "publish 1", "log 0",
            "sample p2 with 1", "sample p3 with 1", "train 4", "publish 2", "log 1", "evaluate", "save",
            "sample p4 with 2", "sample p5 with 2", "train 4", "publish 3", "log 2", "evaluate", "save",
        ]  # fmt: skip
        assert list(world.evaluations) == [0, 2, 3] and world.logged[0]["policy/loss"] == 0.5
        assert saved_state(world) == {"step": 3, "evaluated": 3, "stream": {"taken": 6}, "guard": OFF, "logger": {}, "inputs": {}}

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
        assert saved_state(world) == {"step": 0, "evaluated": 0, "stream": {"taken": 0}, "guard": OFF, "logger": {}, "inputs": {}}

    asyncio.run(scenario())


@pytest.mark.parametrize("dynamic", [False, True])
def test_failing_rewards_stop_the_run_before_anything_is_trained(tmp_path, dynamic):
    async def scenario():
        world = World(tmp_path, fail_rewards=True, dynamic=dynamic)
        with pytest.raises(GuardStop, match=r"(2 of 2|4 of 4) reward calls failed.*timeout after 10 s"):
            await world.loop.run()
        await world.producer.close()
        assert not any(event.startswith("train") for event in world.events)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("every", "at_start", "expected"),
    [(0, True, [0]), (0, False, []), (2, False, [2, 3]), (9, True, [0, 3]), (1, False, [1, 2, 3])],
)
def test_evaluations_come_every_so_many_iterations_and_after_the_last_and_with_0_never(tmp_path, every, at_start, expected):
    async def scenario():
        world = World(tmp_path)
        world.config.evaluation.every_steps, world.config.evaluation.at_start = every, at_start
        await world.loop.run()
        await world.producer.close()
        assert list(world.evaluations) == expected

    asyncio.run(scenario())


def test_a_checkpoint_that_is_due_when_the_interrupt_comes_is_written_once(tmp_path):
    async def scenario():
        world = World(tmp_path)
        log_step = world.log_step

        def interrupted(step, metrics):
            log_step(step, metrics)
            if step == 1:
                world.interrupt.set()

        world.log_step = interrupted
        world.config.evaluation.every_steps = 0
        with pytest.raises(Interrupted):
            await world.loop.run()
        await world.producer.close()
        assert world.events[-2:] == ["log 1", "save"] and world.events.count("save") == 1

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


def test_dynamic_sampling_trains_informative_groups_and_reports_all_that_was_sampled(tmp_path):
    async def scenario():
        world = World(tmp_path, dynamic=True, equal=("p0", "p2"), num_steps=1)
        world.config.evaluation.at_start = False
        await world.loop.run()
        await world.producer.close()
        assert world.events == ["publish 0", "sample p0 with 0", "sample p1 with 0", "sample p2 with 0", "sample p3 with 0",
                                "train 4", "publish 1", "log 0", "evaluate", "save"]  # fmt: skip
        logged = world.logged[0]
        assert (logged["rollout/num_generations"], logged["rollout/num_trained_groups"]) == (2, 2)
        assert logged["rollout/discarded_fraction"] == logged["reward/informative_group_fraction"] == 0.5
        assert logged["reward/mean"] == 0.75 and world.recorded == ["p1", "p3"]
        assert saved_state(world)["stream"] == {"taken": 4}

    asyncio.run(scenario())


def test_at_the_bound_fewer_groups_are_trained_with_a_warning(tmp_path, caplog):
    async def scenario():
        world = World(tmp_path, dynamic=True, equal=("p0", "p1", "p2"), num_steps=1)
        await world.loop.run()
        await world.producer.close()
        assert "train 2" in world.events

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert "iteration 0 trains 1 groups instead of 2: only 1 of 4 groups in 2 batches were informative" in caplog.text


def test_nothing_informative_stops_the_run_by_a_guard_and_leaves_rollouts_to_look_at(tmp_path):
    async def scenario():
        world = World(tmp_path, dynamic=True, equal=tuple(f"p{i}" for i in range(9)))
        with pytest.raises(GuardStop, match=r"iteration 0: 0 of 4 groups in 2 batches are informative.*reward\.function"):
            await world.loop.run()
        await world.producer.close()
        assert not any(event.startswith("train") for event in world.events)
        assert world.recorded == ["p0", "p1", "p2", "p3"]

    asyncio.run(scenario())


def test_an_iteration_without_anything_to_train_stops_the_run_by_a_guard(tmp_path):
    async def scenario():
        world = World(tmp_path)
        world.config.algorithm.overlong.filter = True
        sample = world.sample

        async def truncated(prompt, step):
            group = await sample(prompt, step)
            return replace(group, rollouts=[replace(rollout, finish_reason="length") for rollout in group.rollouts])

        world.producer._sample = truncated
        with pytest.raises(GuardStop, match="iteration 0 has nothing to train: .*rollout.max_response_tokens=1024"):
            await world.loop.run()
        await world.producer.close()

    asyncio.run(scenario())


def test_the_policy_joins_after_the_critic_s_warm_up_and_versions_go_on_all_the_while(tmp_path):
    async def scenario():
        world = World(tmp_path)
        world.config.critic.num_warmup_iterations = 2
        await world.loop.run()
        await world.producer.close()
        told = [event for event in world.events if event.startswith(("train", "publish"))]
        assert told[1:] == ["train the critic", "publish 1", "train the critic", "publish 2", "train 4", "publish 3"]

    asyncio.run(scenario())


def test_a_stage_begins_at_its_iteration_with_its_own_numbers(tmp_path, caplog):
    async def scenario():
        stages = [StageConfig(from_step=1, num_prompts_per_step=3), StageConfig(from_step=2, max_response_tokens=1)]
        world = World(tmp_path, stages=stages)
        world.config.algorithm.overlong.penalty_tokens = 1
        await world.loop.run()
        await world.producer.close()
        assert [event for event in world.events if event.startswith("train")] == ["train 4", "train 6", "train 6"]
        assert [row["rollout/stage"] for row in world.logged] == [0, 1, 2]
        assert [row["reward/overlong_penalty_mean"] for row in world.logged] == [0, 0, -1]  # of 1024, 1024 and 1 tokens
        assert saved_state(world)["stream"] == {"taken": 8}

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    assert caplog.text.count("begins stage") == 2 and "iteration 2 begins stage 2" in caplog.text


def test_a_probe_runs_before_the_update_of_every_so_many_iterations(tmp_path):
    async def scenario():
        world = World(tmp_path)
        world.config.probe.every_steps, world.config.probe.num_samples = 2, 3
        await world.loop.run()
        await world.producer.close()
        trained = [event for event in world.events if event.startswith(("probe", "train"))]
        assert trained == ["probe 3", "train 4", "train 4", "probe 3", "train 4"]
        assert [row.get("mismatch/quantization_kl") for row in world.logged] == [0.001, None, 0.001]

    asyncio.run(scenario())


def test_the_guard_stops_a_run_after_a_checkpoint_with_the_iterations_rollouts(tmp_path):
    async def scenario():
        world = World(tmp_path, guard=GuardConfig(action=GuardAction.stop, max_kl=0.01))
        world.kl[0] = 0.02
        with pytest.raises(GuardStop, match=r"iteration 0: mismatch/kl_rollout_old=0\.02 is above guard\.max_kl=0\.01; lower"):
            await world.loop.run()
        await world.producer.close()
        assert world.events[-4:] == ["train 4", "publish 1", "log 0", "save"]
        assert saved_state(world)["step"] == 1
        assert world.recorded == ["p0", "p1"] and world.logged[0]["mismatch/kl_rollout_old"] == 0.02

    asyncio.run(scenario())


@pytest.mark.parametrize("action", [GuardAction.full_precision, GuardAction.raise_precision])
def test_the_guard_has_the_pool_fall_back_and_probes_until_it_samples_as_configured_again(tmp_path, action):
    async def scenario():
        guard = GuardConfig(action=action, max_kl=0.01, recovery_steps=2)
        world = World(tmp_path, guard=guard, num_steps=5)
        world.config.evaluation.every_steps = 0
        world.kl[0] = 0.02
        await world.loop.run()
        await world.producer.close()
        assert [event for event in world.events if not event.startswith(("sample", "eval", "log"))] == [
            "publish 0", "train 4", "fall back", "publish 1", "probe 4", "train 4", "publish 2", "save",
            "probe 4", "train 4", "return", "publish 3", "train 4", "publish 4", "save", "train 4", "publish 5", "save",
        ]  # fmt: skip
        assert [row["rollout/fallback"] for row in world.logged] == [0, 1, 1, 0, 0]

    asyncio.run(scenario())
