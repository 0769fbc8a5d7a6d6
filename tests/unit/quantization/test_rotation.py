"""`quantization.rotation`: the Hadamard matrix, formats that rotate before they encode, and what is refused."""

import math

import pytest
import torch

from qurl.quantization import FORMATS, export_checkpoint, resolved_format, split_rotation
from qurl.quantization.grouped import GroupedFormat
from qurl.quantization.hadamard import SIZES, rotate
from qurl.quantization.lobcq import Layout
from qurl.quantization.lobcq.calibration import calibrate
from qurl.quantization.lobcq.samples import blocks_of, sample_activations, sample_weights
from qurl.vllm_plugin import format_of, quantization_config

GROUPED = [name for name, format in FORMATS.items() if isinstance(format, GroupedFormat)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hadamard(size):
    """float64: the sign at row i and column j is that of the number of ones that i and j have in common."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(size)


@pytest.mark.parametrize("size", SIZES)
def test_blocks_are_multiplied_by_an_orthonormal_matrix_that_undoes_itself(size):
    matrix, values = hadamard(size), normal(3, 2, 256)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    expected = (values.double().unflatten(-1, (-1, size)) @ matrix).flatten(-2)
    found = rotate(values, size)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)  # float32 sums of up to 128 terms of size 1/11
    torch.testing.assert_close(rotate(found, size), values, rtol=0, atol=1e-5)
    assert rotate(values, 0) is values


@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("name", GROUPED)
def test_codes_are_those_of_rotated_operands_and_decoded_numbers_are_turned_back(name, size):
    plain, format = FORMATS[name], resolved_format(name, rotation=size)
    weight, x, bias = normal(5, 384), normal(2, 3, 384, seed=1), normal(5, seed=2)
    wire = format.encode(weight)
    for suffix, tensor in plain.encode(rotate(weight, size)).items():
        assert torch.equal(wire[suffix].float(), tensor.float())
    assert format.bits_per_weight(weight.shape) == plain.bits_per_weight(weight.shape)
    matrix = torch.block_diag(*[hadamard(size)] * (384 // size))
    decoded, rotated = format.decode(wire).double(), plain.decode(wire).double()
    torch.testing.assert_close(decoded, rotated @ matrix, rtol=0, atol=1e-5)
    assert float((decoded - weight).norm() / weight.norm()) < 0.15
    tokens = x.double()
    if not format.keeps_activations:
        codes, scales = format.quantize_activations(x)
        for found, expected in zip((codes, scales), plain.quantize_activations(rotate(x, size)), strict=True):
            assert torch.equal(found, expected)
        tokens = (plain.grouped(codes).double() * scales[..., None]).flatten(-2) @ matrix
    torch.testing.assert_close(format.round_activations(x).double(), tokens, rtol=0, atol=1e-5)
    # the product of rotated operands: orthonormal matrices leave it as it is
    torch.testing.assert_close(format.linear(x, wire, bias).double(), tokens @ matrix @ rotated.T + bias, rtol=0, atol=1e-3)
    if format.rounds_stochastically:
        ours, theirs = (torch.Generator().manual_seed(0) for _ in range(2))
        again = plain.encode_stochastically(rotate(weight, size), theirs)
        assert torch.equal(format.encode_stochastically(weight, ours)["weight"], again["weight"])


def test_a_rotated_format_is_another_format_and_no_rotation_is_none():
    assert resolved_format("lobcq", rotation=0) is FORMATS["lobcq"]
    keys = {resolved_format(name, rotation=size).key for name in GROUPED for size in (0, *SIZES)}
    assert len(keys) == len(GROUPED) * (1 + len(SIZES))
    assert split_rotation("lobcq:a@b.json@64") == ("lobcq:a@b.json", 64) and split_rotation("nvfp4") == ("nvfp4", 0)
    codebooks = FORMATS["lobcq"].codebooks.weights.content
    own = resolved_format("lobcq", codebooks=codebooks, rotation=32)
    assert own.rotation == 32 and own.codebooks == FORMATS["lobcq"].codebooks


def test_what_cannot_be_rotated_is_refused_with_the_key(tmp_path):
    for name, rotation, told in (
        ("lobcq", 48, "quantization.rotation=48 is no size of a block; use 0 for none, or one of 16, 32, 64, 128"),
        ("lobcq", True, "quantization.rotation=True is no size of a block"),
        ("int8", 16, "quantization.rotation=16 needs a format whose scales belong to groups of inputs, such as quantization=lobcq"),
        ("none", 16, "quantization.rotation=16 needs a format .*, and none is given"),
    ):
        with pytest.raises(ValueError, match=told):
            resolved_format(name, rotation=rotation)
    with pytest.raises(ValueError, match=r"quantization\.rotation=128 needs a multiple of 128 input features, not 192; use a"):
        resolved_format("lobcq", rotation=128).encode(normal(2, 192))
    with pytest.raises(ValueError, match="quantization=lobcq needs a multiple of 64 input features, not 96"):
        resolved_format("lobcq", rotation=16).encode(normal(2, 96))
    with pytest.raises(ValueError, match="compressed-tensors has no mxfp4"):  # whose activations it would not rotate
        export_checkpoint(tmp_path, tmp_path / "out", resolved_format("mxfp4", rotation=16))
    assert FORMATS["mxfp4"].scheme is not None
    assert [resolved_format(*name, rotation=size).column_multiple for *name, size in (("lobcq", 16), ("mxfp4", 64))] == [64, 64]


def test_a_checkpoint_says_its_rotation_and_who_knows_none_refuses_it():
    entry = quantization_config("lobcq", encoded=True, rotation=64)
    assert entry["rotation"] == 64 and format_of(entry).rotation == 64
    assert "rotation" not in quantization_config("lobcq", encoded=True)
    assert quantization_config("lobcq", rotation=64) == {
        "quant_method": "qurl", "format": "lobcq", "ignore": [], "encoded": False, "rotation": 64
    }  # fmt: skip
    del entry["rotation"]  # as one reads it who does not look
    with pytest.raises(ValueError, match=r"quantization_config\.version=2: .* another version .*, 1; quantize the model again"):
        format_of(entry)


def nmse(exact, copy):
    return float((exact.double() - copy.double()).square().sum() / exact.double().square().sum())


def own_codebooks(rotation):
    """Calibrated on other weights and activations, rotated."""
    generator = torch.Generator().manual_seed(0)
    weights, activations = (rotate(sample(32, generator), rotation) for sample in (sample_weights, sample_activations))
    amax = activations.abs().amax(dim=1, keepdim=True)
    blocks = [blocks_of(weights, weights.abs().amax().view(1), Layout()), blocks_of(activations, amax, Layout())]
    return calibrate(torch.cat(blocks), Layout(), max_rounds=12).codebooks.content


def test_outlying_channels_cost_less_where_groups_are_long_and_more_where_they_are_short():
    generator = torch.Generator().manual_seed(5)
    weight, x = sample_weights(256, generator), sample_activations(128, generator)
    exact = x.double() @ weight.double().T
    noise = {}
    for name, rotation in [(name, size) for name in ("nvfp4", "mxfp4", "lobcq", "own") for size in (0, 16, 64, 128)]:
        codebooks = own_codebooks(rotation) if name == "own" else None
        format = resolved_format("lobcq" if name == "own" else name, codebooks=codebooks, rotation=rotation)
        wire = format.encode(weight)
        noise[name, rotation] = (
            nmse(weight, format.decode(wire)), nmse(x, format.round_activations(x)), nmse(exact, format.linear(x, wire))
        )  # fmt: skip
        print(f"{name}@{rotation}", *(f"{100 * value:.3f} %" for value in noise[name, rotation]))
    for size in (16, 64, 128):
        assert all(noise["nvfp4", size][i] > 1.02 * noise["nvfp4", 0][i] for i in range(3))
        assert all(noise["mxfp4", size][i] < 0.85 * noise["mxfp4", 0][i] for i in (1, 2))
        assert noise["lobcq", size][1] < 0.95 * noise["lobcq", 0][1]
        assert noise["own", size][2] < 0.92 * noise["own", 0][2]
        assert noise["own", size][2] < 0.92 * noise["lobcq", size][2]  # rotated numbers want books of their own
