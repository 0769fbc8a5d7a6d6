"""Who starts when, with parts that only note their turn."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from qurl.config import TrainConfig
from qurl.config.placement import Placement
from qurl.trainer import start


class Part:
    """Learner, pool or reward processes; each takes a few turns of the event loop to start."""

    def __init__(self, name, events, error=None):
        self.name, self.events, self.error = name, events, error

    async def start(self, *files):
        self.events.append(f"{self.name} starts")
        for _ in range(5):
            await asyncio.sleep(0)
        if self.error:
            raise self.error
        self.events.append(f"{self.name} is up")

    async def set_fallback(self, fallback):
        pass

    def release_memory(self):
        self.events.append(f"{self.name} releases memory")


class Closing(Part):
    async def close(self):
        self.events.append(f"{self.name} ends")


class Learner(Part):
    def close(self):
        self.events.append(f"{self.name} ends")


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """A function that starts all parts on a device and returns what happened, and the pool's starter of engines."""

    def run(device, colocate, error=None):
        events, found = [], {}
        config = TrainConfig()
        config = replace(config, cluster=replace(config.cluster, colocate=colocate))
        placement = Placement(
            device=device, engine_threads=1, learner_threads=1, learner_core_share=None, gpus_per_engine=0.5, gpus_per_rank=0.5
        )
        monkeypatch.setattr(start, "place", lambda config: placement)
        monkeypatch.setattr(start, "_learner", lambda *args: Learner("learner", events))
        monkeypatch.setattr(start, "RewardPool", lambda config: Closing("rewards", events))
        monkeypatch.setattr(start, "start_engine_actor", lambda *args, **options: events.append("an engine starts"))
        monkeypatch.setattr(start, "shared_paths", lambda config: {})

        def pool(config, starter, **options):
            found["starter"] = starter
            return Closing("pool", events, error)

        monkeypatch.setattr(start, "RolloutPool", pool)

        class Gpus:
            def of_engine(self, index):
                return "DEFAULT"

        async def go():
            async with start.started_parts(config, tmp_path, Path("logs"), Gpus(), None, None, asyncio.Event()):
                events.append("all are up")
                found["starter"]("1")

        try:
            asyncio.run(go())
        except RuntimeError as failure:
            events.append(str(failure).split(";")[0])
        return events

    return run


def test_on_a_shared_gpu_the_learner_starts_when_the_engines_are_up(parts):
    events = parts("cuda", colocate=True)
    assert events.index("pool is up") < events.index("learner starts") < events.index("learner is up") < events.index("all are up")
    assert events.index("rewards starts") < events.index("pool is up")
    after = events[events.index("all are up") + 1 :]
    assert after[:2] == ["learner releases memory", "an engine starts"]


@pytest.mark.parametrize("device, colocate", [("cuda", False), ("cpu", True), ("cpu", False)])
def test_elsewhere_both_start_side_by_side(parts, device, colocate):
    events = parts(device, colocate)
    assert max(map(events.index, ("pool starts", "learner starts"))) < min(map(events.index, ("pool is up", "learner is up")))
    assert "learner releases memory" not in events


def test_where_no_engine_starts_the_learner_of_its_gpu_does_not_either_and_all_parts_end(parts):
    events = parts("cuda", colocate=True, error=OSError("no memory"))
    assert "learner starts" not in events and {"learner ends", "pool ends", "rewards ends"} <= set(events)
    assert events[-1].startswith("the rollout engine did not start: ") and "no memory" in events[-1]
