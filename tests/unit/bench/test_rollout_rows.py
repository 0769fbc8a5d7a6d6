"""Ratios of the rollout benchmark, from given times."""

import math
import os
import select
import subprocess
import sys

import pytest

from qurl.bench.rollout import _rows, run_rollout_bench
from qurl.bench.rollout_shapes import head_bytes, linear_layers, write_models

TINY_WEIGHTS = 2 * 128 * (256 + 128 + 2 * 256 + 256)
"""Of the linear layers: q, k and v, o, gate and up, down."""

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
    held = {"none": 2.0 * TINY_WEIGHTS, "int8": 1.0 * TINY_WEIGHTS, "stock_int8": 1.25 * TINY_WEIGHTS}
    rows = {(row.format, row.baseline): row for row in _rows("tiny", 16, 10, seconds, held, 1e9, 0)}
    assert set(rows) == {("none", "none"), ("int8", "none"), ("stock_int8", "none"), ("int8", "stock_int8")}
    against_none = rows["int8", "none"]
    assert (against_none.ratio, against_none.ratio_min, against_none.ratio_max) == (2.0, 1.0, 4.0)
    assert against_none.tokens_per_s == 16 * 10 / 2.0
    assert rows["stock_int8", "none"].ratio == 2.0
    assert rows["int8", "stock_int8"].ratio == 1.0  # median of 1, 2 and 1/2, not the ratio of medians
    assert [rows[name, "none"].bytes_per_weight for name in seconds] == [2.0, 1.0, 1.25]


def test_a_share_is_of_the_weights_of_a_step_and_there_is_none_without_a_limit_or_from_the_cache():
    seconds, held = {"int8": [2.0, 2.0, 5.0]}, {"int8": 1.5 * TINY_WEIGHTS}
    step_bytes = 1.5 * TINY_WEIGHTS + 2 * 512 * 128  # and lm_head

    def share(limit, cache_bytes):
        [row] = _rows("tiny", 16, 10, seconds, held, limit, cache_bytes)
        return row.bandwidth_share

    assert share(1e9, step_bytes - 1) == pytest.approx(step_bytes / 0.2 / 1e9)
    assert share(1e9, step_bytes) is None and share(None, 0) is None


def test_layers_of_a_shape_are_those_of_its_model(tmp_path):
    from safetensors import safe_open

    with safe_open(write_models("tiny", ["none"], "stock_", tmp_path)["none"] / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    assert sum(math.prod(shape) for name, shape in shapes.items() if name.endswith("_proj.weight")) == TINY_WEIGHTS
    assert sum(map(math.prod, linear_layers("tiny"))) == TINY_WEIGHTS
    assert head_bytes("tiny") == 2 * math.prod(shapes["model.embed_tokens.weight"])


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
