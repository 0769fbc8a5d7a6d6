"""The order of prompts over epochs, and that a resumed stream continues it."""

from __future__ import annotations

import json

import pytest
import torch

from qurl.data import PromptStream
from qurl.types import Prompt


def prompts(n):
    return [Prompt(prompt_id=f"r{i:06d}", token_ids=[i], text=str(i), ground_truth=str(i), data_source="x") for i in range(n)]


def ids(found):
    return [prompt.prompt_id for prompt in found]


def test_every_epoch_is_a_permutation_of_its_own():
    order = ids(PromptStream(prompts(50), seed=1, shuffle=True).take(150))
    epochs = [order[i : i + 50] for i in (0, 50, 100)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == [f"e{number}-r{i:06d}" for i in range(50)]
    rows = [[name.split("-")[1] for name in epoch] for epoch in epochs]
    assert rows[0] != rows[1] != rows[2] != rows[0]
    assert len(set(order)) == 150


def test_the_seed_decides_and_without_shuffle_rows_stay_in_order():
    orders = [ids(PromptStream(prompts(20), seed=seed, shuffle=True).take(20)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    plain = ids(PromptStream(prompts(3), seed=5, shuffle=False).take(7))
    assert plain == ["e0-r000000", "e0-r000001", "e0-r000002", "e1-r000000", "e1-r000001", "e1-r000002", "e2-r000000"]


def test_seed_and_epoch_do_not_add_up_to_the_same_order():
    second_epoch = [p.token_ids for p in PromptStream(prompts(20), seed=0, shuffle=True).take(40)[20:]]
    assert second_epoch != [p.token_ids for p in PromptStream(prompts(20), seed=1, shuffle=True).take(20)]


@pytest.mark.parametrize("cut", [0, 1, 4, 5, 6, 9, 10, 11, 23])
def test_a_stream_resumed_anywhere_continues_as_if_unbroken(cut):
    unbroken = ids(PromptStream(prompts(5), seed=3, shuffle=True).take(60))
    stream = PromptStream(prompts(5), seed=3, shuffle=True)
    before = ids(stream.take(cut))
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = PromptStream(prompts(5), seed=3, shuffle=True)
    resumed.take(2)  # what it gave before loading must not matter
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    middle = ids(resumed.take(7))
    again = PromptStream(prompts(5), seed=3, shuffle=True)
    again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    assert before + middle + ids(again.take(20)) == unbroken[: cut + 27]
    assert ids(stream.take(10)) == unbroken[cut : cut + 10]  # taking the state moved nothing


def test_sizes_of_batches_do_not_change_the_order():
    whole = ids(PromptStream(prompts(7), seed=2, shuffle=True).take(30))
    stream = PromptStream(prompts(7), seed=2, shuffle=True)
    assert [name for n in (1, 13, 0, 16) for name in ids(stream.take(n))] == whole


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    stream = PromptStream(prompts(3), seed=0, shuffle=True)
    stream.take(8)
    stream.load_state_dict(stream.state_dict())
    stream.take(8)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("n", "seed", "shuffle", "word"), [(4, 3, True, "num_prompts"), (5, 4, True, "seed"), (5, 3, False, "shuffle")]
)
def test_a_position_in_other_data_is_refused(n, seed, shuffle, word):
    state = PromptStream(prompts(5), seed=3, shuffle=True).state_dict()
    with pytest.raises(ValueError, match=f"{word}="):
        PromptStream(prompts(n), seed=seed, shuffle=shuffle).load_state_dict(state)


def test_a_stream_needs_prompts_with_unique_ids():
    with pytest.raises(ValueError, match="at least one"):
        PromptStream([], seed=0, shuffle=True)
    with pytest.raises(ValueError, match="unique"):
        PromptStream(prompts(2) + prompts(1), seed=0, shuffle=True)
