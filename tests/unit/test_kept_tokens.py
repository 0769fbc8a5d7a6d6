"""Sets of kept tokens: what goes in comes out, in few bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qurl.kept_tokens import join_sets, max_bytes_per_token, pack_sets, packed_sizes, split_kinds, unpack_sets

VOCAB = 300


def draw_sets(seed, sizes):
    rng = np.random.default_rng(seed)
    sets = [np.sort(rng.choice(VOCAB, size, replace=False)) for size in sizes]
    return [int(rng.choice(ids)) for ids in sets], sets


SIZES = st.lists(st.integers(1, VOCAB), max_size=12)


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(0, 2**32 - 1))
def test_sets_of_every_size_come_out_as_they_went_in(sizes, seed):
    tokens, sets = draw_sets(seed, sizes)
    kept = pack_sets(tokens, sets, VOCAB)
    assert [ids.tolist() for ids in unpack_sets(kept)] == [ids.tolist() for ids in sets]
    assert kept == pack_sets(tokens, [ids.tolist() for ids in sets], VOCAB), "vLLM's lists are as good as arrays"


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(0, 2**32 - 1), st.data())
def test_any_range_of_tokens_is_split_into_ids_and_bitmaps_that_say_the_same(sizes, seed, data):
    tokens, sets = draw_sets(seed, sizes)
    kept = pack_sets(tokens, sets, VOCAB)
    start = data.draw(st.integers(0, len(sizes)))
    stop = data.draw(st.integers(start, len(sizes)))
    rows, ids, dense_rows, bitmaps = split_kinds(kept, start, stop)
    found = np.zeros((stop - start, VOCAB), dtype=bool)
    found[rows, ids] = True
    found[dense_rows] = np.unpackbits(bitmaps, axis=1, count=VOCAB, bitorder="little")
    assert [np.flatnonzero(row).tolist() for row in found] == [ids.tolist() for ids in sets[start:stop]]


@settings(max_examples=50, deadline=None)
@given(SIZES, SIZES, st.integers(0, 2**32 - 1))
def test_joined_sets_are_those_of_both(first, second, seed):
    (tokens, sets), (more_tokens, more) = draw_sets(seed, first), draw_sets(seed + 1, second)
    joined = join_sets([pack_sets(tokens, sets, VOCAB), pack_sets(more_tokens, more, VOCAB)])
    assert joined == pack_sets(tokens + more_tokens, sets + more, VOCAB)


def test_a_set_takes_four_bytes_an_id_and_at_most_a_bit_for_each_token_of_the_vocabulary():
    sizes, vocab_size = [1, 100, 4748, 4749, 151936], 151936
    kept = pack_sets([0] * 5, [np.arange(size) for size in sizes], vocab_size)
    assert packed_sizes(kept).tolist() == [4, 400, 18992, 18992, 18992]
    assert kept.data.nbytes == packed_sizes(kept).sum()
    assert (max_bytes_per_token(20, vocab_size), max_bytes_per_token(-1, vocab_size)) == (80, 18992)


@pytest.mark.parametrize("tokens, sets", [([5], [[4, 6]]), ([4], [[6, 4]]), ([4], [[4, 4]])])
def test_a_sampled_token_outside_its_set_and_a_set_out_of_order_are_refused(tokens, sets):
    with pytest.raises(ValueError, match="not in the set|ascending"):
        pack_sets(tokens, sets, VOCAB)


def test_sets_of_different_vocabularies_do_not_mix():
    with pytest.raises(ValueError, match=r"\[10, 300\]"):
        join_sets([pack_sets([1], [[1]], VOCAB), pack_sets([1], [[1]], 10)])
