"""Rows of the benchmark of switches, from given times."""

import pytest

from qurl.bench.switch import _rows, run_switch_bench


def test_a_row_has_the_median_and_the_range_of_its_precision():
    seconds = {"k4-w1-a2": [0.25, 0.125, 1.0], "k2-w4-a4": [0.5, 0.5, 0.5]}
    first, second = _rows("tiny", 2, seconds, {"k4-w1-a2": [True, False, True], "k2-w4-a4": [True, True, True]})
    assert (first.precision, first.time_ms, first.time_ms_min, first.time_ms_max) == ("k4-w1-a2", 250, 125, 1000)
    assert first.equals_started is False and second.equals_started is True
    assert (first.num_weights, first.num_threads) == (2 * 128 * (256 + 128 + 2 * 256 + 256), 2)
    assert [row.equals_started for row in _rows("tiny", 2, seconds, {})] == [None, None]


@pytest.mark.parametrize("options,message", [
    ({"shapes": ["3b"]}, "shape '3b' is unknown; use some of tiny"),
    ({"precisions": ["k4-w1-a2", "k9"]}, "'k9'"),
    ({"precisions": ["k4-w1-a2", "k4-w1-a2"]}, "1 precisions and 5 rounds: a switch needs at least 2 and 1"),
    ({"num_rounds": 0}, "5 precisions and 0 rounds"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_anything_starts(options, message):
    with pytest.raises(ValueError, match=message):
        run_switch_bench(**options)
