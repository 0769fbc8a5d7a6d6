"""Ratios of the rollout benchmark, from given times."""

import os
import select
import subprocess
import sys

import pytest

from qurl.bench.rollout import _rows, run_rollout_bench

TELLING_BENCHMARK = """
import subprocess
from qurl.bench.rollout import run_rollout_bench

class Popen(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        print(self.pid, flush=True)

subprocess.Popen = Popen
run_rollout_bench(shapes=["tiny"], batch_sizes=[1])
"""  # says which process measures


def test_ratios_pair_the_times_of_a_round():
    seconds = {"none": [4.0, 8.0, 2.0], "int8": [2.0, 2.0, 2.0], "stock_int8": [2.0, 4.0, 1.0]}
    rows = {(row.format, row.baseline): row for row in _rows("tiny", 16, 10, seconds)}
    assert set(rows) == {("none", "none"), ("int8", "none"), ("stock_int8", "none"), ("int8", "stock_int8")}
    against_none = rows["int8", "none"]
    assert (against_none.ratio, against_none.ratio_min, against_none.ratio_max) == (2.0, 1.0, 4.0)
    assert against_none.tokens_per_s == 16 * 10 / 2.0
    assert rows["stock_int8", "none"].ratio == 2.0
    assert rows["int8", "stock_int8"].ratio == 1.0  # median of 1, 2 and 1/2, not the ratio of medians
    assert rows["none", "none"].bytes_per_weight == 2.0 and against_none.bytes_per_weight == 1.0 + 4.0 / 128


@pytest.mark.parametrize("options,message", [
    ({"shapes": ["3b"]}, "shape '3b' is unknown; use some of tiny"),
    ({"formats": ["none", "stock_none"]}, "'stock_none' is unknown"),
    ({"formats": []}, "format .* is unknown"),
    ({"batch_sizes": [0]}, "at least 1"),
    ({"num_rounds": 0}, "at least 1"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_anything_starts(options, message):
    with pytest.raises(ValueError, match=message):
        run_rollout_bench(**options)


def test_a_killed_benchmark_takes_its_measuring_process_along():
    with subprocess.Popen([sys.executable, "-c", TELLING_BENCHMARK], stdout=subprocess.PIPE) as benchmark:
        child = os.pidfd_open(int(benchmark.stdout.readline()))
        benchmark.kill()
        assert select.select([child], [], [], 60)[0], "it lives on"
    os.close(child)
