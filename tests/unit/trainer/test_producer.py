"""The staleness bound, dynamic sampling, and what a checkpoint must remember of the prompt stream."""

import asyncio
import random

import pytest

from qurl.config import DynamicSamplingConfig
from qurl.errors import GuardStop
from qurl.trainer.producer import DynamicSampling, Producer
from qurl.types import Prompt, RewardResult, Rollout, RolloutGroup, ScoredGroup


class CountingStream:
    """Prompts 0, 1, 2, ...; its state is the next number."""

    def __init__(self, start=0):
        self.next = start

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


def make_producer(
    versions, stream, sampled, *, max_staleness, num_steps=5, hold=None, first_step=0, dynamic=None, patience=None,
    num_prompts=lambda step: 3,
):  # fmt: skip
    async def sample(prompt, step):
        sampled.append((int(prompt.prompt_id), versions.version) if num_prompts(0) == 3 else (int(prompt.prompt_id), step))
        if hold is not None:
            await hold.wait()
        for _ in range(patience(int(prompt.prompt_id)) if patience else 0):
            await asyncio.sleep(0)
        rollout = Rollout(sample_index=0, token_ids=[1], rollout_logprobs=[0.0], weight_versions=[versions.version],
                          finish_reason="stop", text="", engine_id="0", seed=0)  # fmt: skip
        return RolloutGroup(prompt=prompt, rollouts=[rollout])

    async def score(group):
        return ScoredGroup(group=group, rewards=[RewardResult(value=1.0)])

    return Producer(
        stream=stream, num_prompts_per_step=num_prompts, max_staleness=max_staleness, first_step=first_step, num_steps=num_steps,
        wait_for_version=versions.wait_for, sample=sample, score=score, dynamic_sampling=dynamic,
    )  # fmt: skip


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


def dynamic(informative, *, check=lambda groups: None, **options):
    """informative: of the prompt's number."""
    return DynamicSampling(config=DynamicSamplingConfig(enabled=True, **options), check=check,
                           is_informative=lambda scored: informative(int(scored.group.prompt.prompt_id)))  # fmt: skip


def numbers(groups):
    return [int(scored.group.prompt.prompt_id) for scored in groups]


def is_even(number):
    return number % 2 == 0


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_uninformative_groups_are_replaced_from_further_batches_in_dispatch_order(max_staleness):
    async def scenario():
        versions, stream = Versions(), CountingStream()
        producer = make_producer(versions, stream, [], max_staleness=max_staleness, dynamic=dynamic(is_even), num_steps=2)
        await versions.publish(0)
        first = await producer.take(0)
        assert numbers(await first.trained) == [0, 2, 4]
        assert (first.num_generations, len(first.sampled()), stream.next >= 6) == (2, 6, True)
        await versions.publish(1)
        second = await producer.take(1)
        assert numbers(await second.trained) == [6, 8, 10]
        assert (first.stream_state, second.stream_state, producer.stream_state()) == ({"next": 0}, {"next": 6}, {"next": 12})
        await producer.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_what_is_trained_depends_on_rewards_alone_and_goes_on_after_a_resume(max_staleness, seed):
    """Whatever order responses come in: the same groups, the same positions; and the same again from each of these positions."""
    wanted = {step: [] for step in range(5)}
    positions, number = [], 0
    for step in range(5):  # batch by batch, as written down in a slow loop
        positions.append(number)
        while len(wanted[step]) < 3:
            wanted[step] += [n for n in range(number, number + 4) if n % 3 == 0]
            number += 4
        wanted[step] = wanted[step][:3]

    async def scenario(first_step):
        versions, stream, random_order = Versions(), CountingStream(positions[first_step]), random.Random(seed)
        producer = make_producer(
            versions, stream, [], max_staleness=max_staleness, first_step=first_step,
            dynamic=dynamic(lambda n: n % 3 == 0, num_prompts_per_generation=4), patience=lambda n: random_order.randrange(20),
        )  # fmt: skip
        await versions.publish(first_step)
        for step in range(first_step, 5):
            assert producer.stream_state() == {"next": positions[step]}
            batch = await producer.take(step)
            assert batch.stream_state == {"next": positions[step]}
            assert numbers(await batch.trained) == wanted[step]
            await versions.publish(step + 1)
        await producer.close()

    for first_step in range(5):
        asyncio.run(scenario(first_step))


def test_another_batch_starts_once_it_is_certain_to_be_needed_and_none_before():
    async def scenario():
        versions, stream, sampled, hold = Versions(), CountingStream(), [], asyncio.Event()

        def patience(number):
            return 0 if number == 1 else 10**6  # only the answer of prompt 1 comes

        producer = make_producer(versions, stream, sampled, max_staleness=0, dynamic=dynamic(is_even), patience=patience)
        await versions.publish(0)
        await producer.take(0)
        await settle()
        assert stream.next == 6  # 1 is odd: of 0, 1, 2 at most two are informative
        await producer.close()

        stream = CountingStream()
        producer = make_producer(versions, stream, sampled, max_staleness=0, dynamic=dynamic(is_even), hold=hold)
        batch = await producer.take(0)
        await settle()
        assert stream.next == 3  # all of them may be
        batch.cancel()
        await producer.close()

    asyncio.run(scenario())


def test_the_next_iteration_starts_where_this_one_ended_and_before_it_is_trained():
    async def scenario():
        versions, stream, sampled = Versions(), CountingStream(), []
        producer = make_producer(versions, stream, sampled, max_staleness=1, dynamic=dynamic(is_even))
        await versions.publish(0)
        batch = await producer.take(0)
        await batch.trained
        await settle()
        assert {number for number, _ in sampled} == set(range(12))  # iterations 0 and 1, from the same weights
        await versions.publish(1)
        await settle()
        assert max(number for number, _ in sampled) == 17 and min(v for n, v in sampled if n >= 12) == 1
        await producer.close()

    asyncio.run(scenario())


def test_at_the_bound_what_was_found_is_what_there_is():
    async def scenario(informative, expected):
        versions, stream = Versions(), CountingStream()
        producer = make_producer(versions, stream, [], max_staleness=0, dynamic=dynamic(informative, max_generations=2))
        await versions.publish(0)
        batch = await producer.take(0)
        assert numbers(await batch.trained) == expected
        assert (batch.num_generations, stream.next) == (2, 6)
        await producer.close()

    asyncio.run(scenario(lambda number: number in (1, 5), [1, 5]))
    asyncio.run(scenario(lambda number: False, []))


def test_no_other_batch_is_sampled_where_the_check_says_that_it_is_in_vain():
    def check(groups):
        raise GuardStop(f"{len(groups)} groups without a reward")

    async def scenario():
        versions, stream = Versions(), CountingStream()
        producer = make_producer(versions, stream, [], max_staleness=0, dynamic=dynamic(lambda n: False, check=check))
        await versions.publish(0)
        batch = await producer.take(0)
        with pytest.raises(GuardStop, match="without a reward"):
            await batch.trained
        await settle()
        assert stream.next == 3 and all(task.done() for task in batch.groups)
        await producer.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("selection", [None, dynamic(is_even)])
def test_a_group_that_fails_ends_its_iteration_and_the_others_under_way(selection):
    async def scenario():
        versions, hold = Versions(), asyncio.Event()
        producer = make_producer(versions, CountingStream(), [], max_staleness=0, dynamic=selection, hold=hold)

        async def lost(group):
            raise RuntimeError("the verifier is gone")

        producer._score = lost
        await versions.publish(0)
        batch = await producer.take(0)
        hold.set()
        with pytest.raises(RuntimeError, match="the verifier is gone"):
            await batch.trained
        assert all(task.done() for task in batch.groups)
        await producer.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_every_iteration_is_sampled_by_its_own_numbers_however_early_it_is_dispatched(max_staleness):
    async def scenario():
        versions, stream, sampled = Versions(), CountingStream(), []
        producer = make_producer(
            versions, stream, sampled, max_staleness=max_staleness, num_prompts=lambda step: 2 if step < 3 else 4
        )
        await versions.publish(0)
        for step in range(5):
            batch = await producer.take(step)
            assert len(await batch.trained) == batch.num_prompts == (2 if step < 3 else 4)
            await versions.publish(step + 1)
        assert [step for _, step in sampled] == [0, 0, 1, 1, 2, 2, *[3] * 4, *[4] * 4]
        await producer.close()

    asyncio.run(scenario())
