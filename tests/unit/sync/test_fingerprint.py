"""qurl.sync.fingerprint."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qurl.sync import fingerprint
from qurl.sync.fingerprint import CHUNK_WORDS, _mix

MASK = (1 << 64) - 1


def slow_fingerprint(data: bytes) -> int:
    """The same number from Python integers."""
    state = _mix(len(data))
    data = data + bytes(-len(data) % 4)
    words = [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, len(data), 4)]
    for start in range(0, len(words), CHUNK_WORDS):
        total = 0
        for position, word in enumerate(words[start : start + CHUNK_WORDS]):
            total += word * (_mix((position + 1) * 0x9E3779B97F4A7C15) | 1)
        state = _mix(state ^ (total & MASK))
    return state - (1 << 64) if state >> 63 else state


@pytest.mark.parametrize("num_bytes", [0, 1, 3, 4, 5, 1000, 4 * CHUNK_WORDS, 4 * CHUNK_WORDS + 1, 9 * CHUNK_WORDS])
def test_it_equals_arithmetic_in_python_integers(num_bytes):
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(num_bytes))
    assert fingerprint(data) == slow_fingerprint(data.numpy().tobytes())


@pytest.mark.parametrize("num_bytes", [1, 6, 64, 4 * CHUNK_WORDS + 7])
def test_every_single_bit_counts(num_bytes):
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    original = fingerprint(data)
    seen = {original}
    places = range(num_bytes) if num_bytes <= 64 else [0, 5, num_bytes // 2, 4 * CHUNK_WORDS - 1, 4 * CHUNK_WORDS, num_bytes - 1]
    for place in places:
        for bit in range(8):
            flipped = data.clone()
            flipped[place] ^= 1 << bit
            seen.add(fingerprint(flipped))
    assert len(seen) == 1 + 8 * len(places)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(min_size=2, max_size=300), i=st.integers(0, 299), j=st.integers(0, 299))
def test_swapped_bytes_count(data, i, j):
    i, j = i % len(data), j % len(data)
    swapped = bytearray(data)
    swapped[i], swapped[j] = data[j], data[i]
    before, after = (torch.tensor(list(x), dtype=torch.uint8) for x in (data, swapped))
    assert (fingerprint(before) == fingerprint(after)) == (data == bytes(swapped))


def test_swapped_words_that_differ_in_the_top_bit_only_count():
    """Sums of 64-bit words times odd factors miss these."""
    words = torch.zeros(CHUNK_WORDS * 2, dtype=torch.int64)
    prints = set()
    for place in [0, 1, 2, 100, CHUNK_WORDS // 2, CHUNK_WORDS]:
        changed = words.clone()
        changed[place] = -(2**63)
        prints.add(fingerprint(changed))
    assert len(prints) == 6


def test_swapped_chunks_and_zeros_at_the_end_count():
    data = torch.arange(3 * CHUNK_WORDS, dtype=torch.int32)
    swapped = torch.cat([data[CHUNK_WORDS : 2 * CHUNK_WORDS], data[:CHUNK_WORDS], data[2 * CHUNK_WORDS :]])
    longer = torch.cat([data, torch.zeros(1, dtype=torch.int32)])
    assert len({fingerprint(t) for t in (data, swapped, longer)}) == 3


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64, torch.bool])
def test_it_reads_bytes_of_every_dtype_in_row_major_order(dtype):
    tensor = torch.randint(0, 2, (33, 5), generator=torch.Generator().manual_seed(2)).to(dtype)
    raw = tensor.contiguous().view(torch.uint8).flatten()
    assert fingerprint(tensor) == fingerprint(raw)
    assert fingerprint(tensor.T) == fingerprint(tensor.T.contiguous())
    assert fingerprint(tensor[1:, 1:]) == fingerprint(tensor[1:, 1:].clone())


def test_unaligned_views_scalars_parameters_and_empty_tensors_work():
    data = torch.arange(103, dtype=torch.uint8)
    assert all(fingerprint(data[k:]) == fingerprint(data[k:].clone()) for k in range(9))
    assert fingerprint(torch.tensor(1.5)) == fingerprint(torch.tensor([1.5]))
    assert fingerprint(torch.nn.Parameter(torch.ones(3))) == fingerprint(torch.ones(3))
    assert fingerprint(torch.empty(0)) == fingerprint(torch.empty(0, 7))


def test_it_fits_into_a_signed_64_bit_integer():
    prints = [fingerprint(torch.full((5,), k)) for k in range(50)]
    assert all(-(2**63) <= p < 2**63 for p in prints) and min(prints) < 0 < max(prints)
