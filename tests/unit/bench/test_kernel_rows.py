"""The kernel benchmark on matrices of a few bytes."""

import json

import pytest
import torch

pytest.importorskip("vllm")

from qurl.bench.kernels import _matrices, run_kernel_bench
from qurl.quantization.kernels.cpu import library
from qurl.quantization.kernels.cpu.library import KernelsUnavailable
from qurl.quantization.lobcq import Codebooks, CodebookSets, LayerCodebooks, Layout
from qurl.quantization.lobcq.codebooks import save_codebooks


def codebooks_with(layout):
    return Codebooks(layout=layout, entries=(tuple(range(-15, 16, 2)),) * layout.num_codebooks)


def test_rows_pair_formats_and_say_what_ran(tmp_path):
    try:
        library.load()
    except KernelsUnavailable as error:
        pytest.skip(f"no compiled kernels: {error}")
    threads = torch.get_num_threads()
    own = f"lobcq:{tmp_path / 'books.json'}"
    save_codebooks(codebooks_with(Layout(block=2, num_codebooks=2)), tmp_path / "books.json", "by hand")
    names = ["none", "int8", "onednn_int8", "lobcq", own, "nvfp4", "axbxp_k2l2", "axbxp_k1l3"]
    rows = run_kernel_bench(["64x128"], names, [1, 3], num_rounds=3, num_threads=1, cache_bytes=1 << 16)
    assert [(row.num_tokens, row.format) for row in rows] == [(tokens, name) for tokens in (1, 3) for name in names]
    found = {row.format: row for row in rows[: len(names)]}
    assert found["none"].ratio_min == found["none"].ratio_max == 1.0 and found["none"].bytes_per_weight == 2.0
    assert found["lobcq"].kernel == "PackedLoBcq" and found["nvfp4"].kernel == "Decoded" and found["nvfp4"].bytes_per_weight == 4.0
    assert found["lobcq"].bytes_per_weight == 37 / 64 + 8 / 128  # and a double for each row
    assert found[own].kernel == "PackedLoBcq" and found[own].bytes_per_weight == 4.625 / 8 + 8 / 128
    row_scale = 4 / 128
    assert found["axbxp_k2l2"].bytes_per_weight == 5.125 / 8 + row_scale
    assert found["axbxp_k1l3"].kernel == "CompiledInt8" and found["axbxp_k1l3"].bytes_per_weight == 4.1875 / 8 + row_scale
    assert found["onednn_int8"].kernel == "OneDnnInt8" and found["onednn_int8"].is_exact in (False, True)
    for row in rows:
        assert row.ratio_min <= row.ratio <= row.ratio_max and row.baseline == "none" and row.matrix == "64x128"
        assert row.gb_per_s == pytest.approx(row.bytes_per_weight * 64 * 128 / row.time_us / 1e3) and row.bandwidth_share > 0
    assert torch.get_num_threads() == threads


def test_a_model_s_matrices_are_those_that_an_engine_runs():
    assert _matrices(["1.4b", "8x64"]) == [(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960), (8, 64)]


@pytest.mark.parametrize("options,message", [
    ({"shapes": ["3b"]}, "shape '3b' is unknown; use OUTPUTSxINPUTS such as 4096x4096 or some of tiny"),
    ({"shapes": []}, "there is no shape"),
    ({"formats": ["none", "stock_int8"]}, "format 'stock_int8' is unknown; use some of none"),
    ({"batch_sizes": [0]}, "at least 1"),
    ({"num_rounds": 0}, "at least 1"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run_kernel_bench(**options)


def test_codebooks_of_single_layers_are_refused(tmp_path):
    books = codebooks_with(Layout(num_codebooks=1))
    sets = CodebookSets(tuple((layer, LayerCodebooks(weights=books, activations=books)) for layer in ("a", "b")))
    (tmp_path / "sets.json").write_text(json.dumps(sets.content))
    with pytest.raises(ValueError, match="sets.json has codebooks for each layer, and matrices here are of none"):
        run_kernel_bench(["64x128"], [f"lobcq:{tmp_path}/sets.json"], [1], cache_bytes=1 << 16)
