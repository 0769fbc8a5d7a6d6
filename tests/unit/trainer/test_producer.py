"""The staleness bound and what a checkpoint must remember of the prompt stream."""

import asyncio

import pytest

from qurl.trainer.producer import Producer
from qurl.types import Prompt, RewardResult, Rollout, RolloutGroup, ScoredGroup


class CountingStream:
    """Prompts 0, 1, 2, ...; its state is the next number."""

    def __init__(self):
        self.next = 0

    def take(self, n):
        self.next += n
        return [
            Prompt(prompt_id=str(i), token_ids=[1], text="", ground_truth="", data_source="")
            for i in range(self.next - n, self.next)
        ]

    def state_dict(self):
        return {"next": self.next}


class Versions:
    def __init__(self):
        self.version = -1
        self.changed = asyncio.Condition()

    async def publish(self, version):
        async with self.changed:
            self.version = version
            self.changed.notify_all()

    async def wait_for(self, version):
        async with self.changed:
            await self.changed.wait_for(lambda: self.version >= version)


def make_producer(versions, stream, sampled, *, max_staleness, num_steps=5, hold=None):
    async def sample(prompt):
        sampled.append((int(prompt.prompt_id), versions.version))
        if hold is not None:
            await hold.wait()
        rollout = Rollout(sample_index=0, token_ids=[1], rollout_logprobs=[0.0], weight_versions=[versions.version],
                          finish_reason="stop", text="", engine_id="0", seed=0)  # fmt: skip
        return RolloutGroup(prompt=prompt, rollouts=[rollout])

    async def score(group):
        return ScoredGroup(group=group, rewards=[RewardResult(value=1.0)])

    return Producer(stream=stream, num_prompts_per_step=3, max_staleness=max_staleness, first_step=0, num_steps=num_steps,
                    wait_for_version=versions.wait_for, sample=sample, score=score)  # fmt: skip


async def settle():
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_no_prompt_starts_more_than_max_staleness_versions_ahead_of_its_iteration(max_staleness):
    async def scenario():
        versions, stream, sampled = Versions(), CountingStream(), []
        producer = make_producer(versions, stream, sampled, max_staleness=max_staleness)
        await versions.publish(0)
        for step in range(5):
            batch = await producer.take(step)
            groups = await asyncio.gather(*batch.groups)
            assert [int(g.group.prompt.prompt_id) for g in groups] == [3 * step, 3 * step + 1, 3 * step + 2]
            assert min(g.group.rollouts[0].weight_version for g in groups) >= step - max_staleness
            await settle()
            ahead = {number // 3 for number, _ in sampled}
            assert max(ahead) == min(4, step + max_staleness)  # as far ahead as allowed, no further
            await versions.publish(step + 1)
        await producer.close()

    asyncio.run(scenario())


def test_the_stream_state_is_that_before_the_first_batch_that_was_not_taken():
    async def scenario():
        versions, stream, sampled = Versions(), CountingStream(), []
        producer = make_producer(versions, stream, sampled, max_staleness=2)
        await versions.publish(0)
        batch = await producer.take(0)
        await settle()
        assert stream.next == 9  # three iterations dispatched
        assert batch.stream_state == {"next": 0}
        assert producer.stream_state() == {"next": 3}
        await producer.close()

    asyncio.run(scenario())


def test_what_ends_the_producer_reaches_whoever_takes():
    class BrokenStream(CountingStream):
        def take(self, n):
            raise RuntimeError("the dataset is gone")

    async def scenario():
        versions = Versions()
        producer = make_producer(versions, BrokenStream(), [], max_staleness=0)
        await versions.publish(0)
        with pytest.raises(RuntimeError, match="the dataset is gone"):
            await producer.take(0)
        await producer.close()

    asyncio.run(scenario())


def test_close_gives_up_what_is_under_way():
    async def scenario():
        versions, sampled, hold = Versions(), [], asyncio.Event()
        producer = make_producer(versions, CountingStream(), sampled, max_staleness=0, hold=hold)
        await versions.publish(0)
        batch = await producer.take(0)
        await settle()
        assert set(batch.waiting.values()) == {"rollout"}
        batch.cancel()
        await producer.close()
        assert all(task.cancelled() for task in batch.groups)

    asyncio.run(scenario())
