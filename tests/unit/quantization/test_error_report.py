"""Encoding errors of a state dict."""

import math

import pytest
import torch

from qurl.quantization import FORMATS, error_report


def state_dict() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    outlier = torch.randn(32, 64, generator=generator)
    outlier[:, 0] = 50.0
    return {"good.weight": torch.randn(32, 64, generator=generator), "bad.weight": outlier, "zero.weight": torch.zeros(4, 4)}


def test_errors_equal_a_float64_loop_and_the_worst_matrix_is_found():
    state = state_dict()
    report = error_report(state, FORMATS["int8"], {"good", "bad"})
    assert [m.name for m in report.matrices] == ["bad", "good"]
    for matrix in report.matrices:
        weight = state[f"{matrix.name}.weight"]
        decoded = FORMATS["int8"].decode(FORMATS["int8"].encode(weight))
        signal = sum(float(w) ** 2 for w in weight.flatten())
        noise = sum((float(w) - float(v)) ** 2 for w, v in zip(weight.flatten(), decoded.flatten(), strict=True))
        assert matrix.relative_error == pytest.approx(math.sqrt(noise / signal))
        assert matrix.sqnr_db == pytest.approx(10 * math.log10(signal / noise))
    # SQNR of the matrix with outliers is high, for they carry nearly all of the signal
    assert report.worst.name == min(report.matrices, key=lambda m: m.sqnr_db).name and report.sqnr_min_db == report.worst.sqnr_db


def test_exact_copies_have_infinite_sqnr_and_no_error():
    report = error_report(state_dict(), FORMATS["fp8"], ["zero"])
    assert report.sqnr_min_db == math.inf and report.worst.relative_error == 0.0
    assert error_report(state_dict(), FORMATS["none"], ["bad", "good"]).sqnr_min_db == math.inf


def test_missing_weights_and_empty_lists_are_refused():
    with pytest.raises(ValueError, match="absent"):
        error_report(state_dict(), FORMATS["int8"], ["good", "absent"])
    with pytest.raises(ValueError, match="no modules"):
        error_report(state_dict(), FORMATS["int8"], [])
