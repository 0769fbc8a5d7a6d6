"""Rows of the benchmark of installs, from given times."""

import pytest

from qurl.bench.install import _row, run_install_bench


def test_a_row_has_the_median_and_the_range_of_its_rounds():
    found = {"cpu_s": [0.5, 0.25, 1.0], "load_cpu_s": [0.125, 0.25, 0.5], "num_tensors": [534], "num_buckets": [1]}
    row = _row(28, "int8", found)
    assert (row.cpu_s, row.cpu_s_min, row.cpu_s_max, row.load_cpu_s) == (0.5, 0.25, 1.0, 0.25)
    assert (row.num_layers, row.format, row.num_tensors, row.num_buckets) == (28, "int8", 534, 1)


@pytest.mark.parametrize("options,message", [
    ({"formats": ["int3"]}, "format 'int3' is unknown; use some of none"),
    ({"layers": [28, 0]}, "must be at least 1"),
    ({"num_rounds": 0}, "must be at least 1"),
    ({"tensors_per_bucket": -1}, "at least 0"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_anything_starts(options, message):
    with pytest.raises(ValueError, match=message):
        run_install_bench(**options)
