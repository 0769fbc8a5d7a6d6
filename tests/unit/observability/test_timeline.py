import asyncio
import json

import pytest

from qurl.observability import timeline as module
from qurl.observability.timeline import STAGES, Timeline


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic() that moves only when told."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

        def time(self):
            return 1e9

    fake = Clock()
    monkeypatch.setattr(module, "time", fake)
    return fake


def seconds(metrics):
    return {key.removeprefix("time/").removesuffix("_s"): value for key, value in metrics.items() if value}


def test_every_moment_of_a_step_is_accounted_once(clock, tmp_path):
    timeline = Timeline(tmp_path / "timeline.json")
    timeline.begin_step(0)
    clock.now += 1
    with timeline.span("rollout"):
        clock.now += 5
        with timeline.span("reward"):  # nested: its time is not the rollout's
            clock.now += 2
        clock.now += 1
    with timeline.span("a name of our own"):
        clock.now += 3
    assert seconds(timeline.end_step()) == {"step": 12, "rollout": 6, "reward": 2, "idle": 4}


def test_overlapping_tasks_are_not_counted_twice(clock, tmp_path):
    timeline = Timeline(tmp_path / "timeline.json")
    evaluating, done = asyncio.Event(), asyncio.Event()

    async def evaluate():
        with timeline.span("eval"):
            evaluating.set()
            await done.wait()
            clock.now += 4

    async def sync():
        with timeline.span("sync"):
            clock.now += 2
            await evaluating.wait()
            clock.now += 3  # both open: the one opened last has the time
        done.set()

    async def both():
        await asyncio.gather(sync(), evaluate())

    asyncio.run(both())
    assert seconds(timeline.end_step()) == {"step": 9, "sync": 2, "eval": 7}


def test_a_failing_stage_is_closed(clock, tmp_path):
    timeline = Timeline(tmp_path / "timeline.json")
    with pytest.raises(RuntimeError), timeline.span("update"):
        clock.now += 2
        raise RuntimeError
    clock.now += 1
    assert seconds(timeline.end_step()) == {"step": 3, "update": 2, "idle": 1}


def test_stages_measured_elsewhere_come_out_of_idle_and_leave_the_rest(clock, tmp_path):
    timeline = Timeline(tmp_path / "timeline.json")
    start = clock.now
    clock.now += 10
    timeline.add(start, {"time/logprob_s": 2.0, "time/update_s": 7.0}, total=10.0)
    assert seconds(timeline.end_step()) == {"step": 10, "logprob": 2, "update": 7, "idle": 1}


def test_stages_that_claim_more_than_the_call_took_are_scaled_down(clock, tmp_path):
    timeline = Timeline(tmp_path / "timeline.json")
    start = clock.now
    clock.now += 6
    timeline.add(start, {"time/logprob_s": 4.0, "time/update_s": 8.0}, total=6.0)
    assert seconds(timeline.end_step()) == {"step": 6, "logprob": 2, "update": 4}


def test_moving_takes_no_more_than_there_is(clock, tmp_path):
    timeline = Timeline(tmp_path / "timeline.json")
    with timeline.span("rollout"):
        clock.now += 3
    timeline.move("rollout", "reward", 1.0)
    timeline.move("rollout", "reward", 99.0)
    assert seconds(timeline.end_step()) == {"step": 3, "reward": 3}


def test_each_step_starts_from_zero_and_names_every_stage(clock, tmp_path):
    timeline = Timeline(tmp_path / "timeline.json")
    with timeline.span("sync"):
        clock.now += 1
    timeline.end_step()
    clock.now += 5  # between the steps
    timeline.begin_step(1)
    clock.now += 2
    metrics = timeline.end_step()
    assert seconds(metrics) == {"step": 2, "idle": 2}
    assert set(metrics) == {f"time/{name}_s" for name in (*STAGES, "idle", "step")}


def spans(path):
    return [(e["name"], e["ts"], e["dur"]) for e in json.loads(path.read_text()) if e["ph"] == "X"]


def test_the_file_is_a_chrome_trace_after_every_step_and_goes_on_after_a_resume(clock, tmp_path):
    path = tmp_path / "timeline.json"
    for step in range(3):
        timeline = Timeline(path)  # a new process
        timeline.begin_step(step)
        with timeline.span("update"):
            clock.now += 1.5
        timeline.end_step()
        found = spans(path)
        assert [name for name, *_ in found] == ["update", "step"] * (step + 1)
        assert found[-1][2] == 1.5e6  # microseconds
    rows = {e["name"]: e["tid"] for e in json.loads(path.read_text()) if e["ph"] == "X"}
    assert rows["update"] != rows["step"]


def test_a_trace_cut_short_by_a_kill_is_repaired(clock, tmp_path):
    path = tmp_path / "timeline.json"
    timeline = Timeline(path)
    for _ in range(2):
        with timeline.span("sync"):
            clock.now += 1
        timeline.end_step()
    path.write_text(path.read_text()[:-30])
    Timeline(path)
    assert [name for name, *_ in spans(path)] == ["sync", "step", "sync"]
