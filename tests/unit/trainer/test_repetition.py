import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qurl.trainer.repetition import LONGEST_PERIOD, WINDOW, ends_in_loop

TEXT = random.Random(0).choices(range(5000), k=300)


def looped(period, length):
    return (TEXT[:period] * length)[:length]


@pytest.mark.parametrize("period", [1, 2, 15, LONGEST_PERIOD])
@pytest.mark.parametrize("end", [[], [2], TEXT[:1]])
def test_a_loop_of_any_period_is_found_with_or_without_an_end_of_sequence(period, end):
    assert ends_in_loop(TEXT + looped(period, WINDOW + 1) + end)


def test_text_short_responses_longer_periods_and_loops_that_ended_are_none():
    assert not ends_in_loop(TEXT)
    assert not ends_in_loop([]) and not ends_in_loop([5] * WINDOW)
    assert ends_in_loop([5] * (WINDOW + 1))
    assert not ends_in_loop(looped(LONGEST_PERIOD + 1, 200))
    assert not ends_in_loop([5] * 200 + TEXT[:20])


@given(st.integers(1, LONGEST_PERIOD), st.integers(0, WINDOW - 1))
def test_one_other_token_in_the_window_breaks_a_loop(period, position):
    tail = looped(period, WINDOW)
    tail[position] = 6000
    assert not ends_in_loop([*tail, 2])
