"""MXFP4 against a loop over its sixteen numbers, in float64."""

import math

import pytest
import torch

from qurl.quantization import FORMATS
from qurl.quantization.packing import pack, unpack

MXFP4 = FORMATS["mxfp4"]
NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # by code; the last mantissa bit is that of the code


def weights(rows: int, columns: int) -> torch.Tensor:
    """Several magnitudes and, in the first group, every tie and every number beyond the largest."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(rows, columns, generator=generator) * 10.0 ** torch.arange(-3, rows - 3)[:, None]
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5, 7.0, 7.9]
    matrix[0, :32] = torch.tensor([value * sign for value in [*ties, *NUMBERS[2:]] for sign in (1, -1)])
    return matrix


def slow_code(target: float) -> int:
    """The nearest number's code, even where two are equally near; beyond the largest it is the largest."""
    distances = [abs(abs(target) - number) for number in NUMBERS]
    nearest = min(distances)
    code = min((code for code in range(8) if distances[code] == nearest), key=lambda code: code % 2)
    return code + (8 if math.copysign(1.0, target) < 0 else 0)


def slow_encoding(matrix: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """Codes and exponents of a matrix by definition."""
    codes, exponents = [], []
    for row in matrix.tolist():  # Python floats: float64
        codes.append([])
        exponents.append([])
        for start in range(0, len(row), 32):
            group = row[start : start + 32]
            exponent = math.floor(math.log2(max(map(abs, group)))) - 2
            exponents[-1].append(exponent)
            codes[-1] += [slow_code(value / 2.0**exponent) for value in group]
    return codes, exponents


def slow_numbers(codes: list[list[int]], exponents: list[list[int]]) -> torch.Tensor:
    """What the codes stand for; float64."""
    rows = []
    for code_row, exponent_row in zip(codes, exponents, strict=True):
        signed = [-NUMBERS[code - 8] if code >= 8 else NUMBERS[code] for code in code_row]
        rows.append([number * 2.0 ** exponent_row[column // 32] for column, number in enumerate(signed)])
    return torch.tensor(rows, dtype=torch.float64)


def test_weights_equal_the_loop_bit_for_bit():
    matrix = weights(7, 96)
    codes, exponents = slow_encoding(matrix)
    wire = MXFP4.encode(matrix)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in wire.items()} == {
        "weight": (torch.uint8, (7, 48)), "weight_scale": (torch.uint8, (7, 3)),
    }  # fmt: skip
    assert unpack(wire["weight"]).tolist() == codes
    assert wire["weight"][:, 0].tolist() == [row[0] + 16 * row[1] for row in codes]  # the even column in the low half
    assert (wire["weight_scale"].int() - 127).tolist() == exponents
    assert torch.equal(MXFP4.decode(wire).double(), slow_numbers(codes, exponents))
    assert torch.equal(pack(unpack(wire["weight"])), wire["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_equals_the_loop_over_tokens_and_weights(dtype):
    x, matrix, bias = weights(4, 64).flip(0).to(dtype), weights(5, 64), torch.arange(5.0)
    inputs, kernel = (slow_numbers(*slow_encoding(side.float())) for side in (x, matrix))
    codes, scales = MXFP4.quantize_activations(x.view(2, 2, 64))
    assert torch.equal((codes.unflatten(-1, (2, 32)) * scales[..., None]).double().reshape(4, 64), inputs)
    expected = inputs @ kernel.T + bias
    actual = MXFP4.linear(x.view(2, 2, 64), MXFP4.encode(matrix), bias)
    assert actual.dtype == dtype and actual.shape == (2, 2, 5)
    size = inputs.abs() @ kernel.abs().T + bias  # float32 sums of 64 exact products, then one rounding to dtype
    assert ((actual.double().view(4, 5) - expected).abs() <= 64 * 2**-24 * size + torch.finfo(dtype).eps * expected.abs()).all()


def test_a_group_of_zeros_has_the_smallest_scale_and_so_have_numbers_too_small_for_their_own():
    matrix = torch.zeros(1, 96)
    matrix[0, 32], matrix[0, 64] = 2.0**-149, 2.0**-124
    wire = MXFP4.encode(matrix)
    assert wire["weight_scale"].tolist() == [[1, 1, 1]]  # 2^-126, the smallest normal float32
    assert MXFP4.decode(wire)[0, ::32].tolist() == [0.0, 0.0, 2.0**-124]


def test_a_number_of_inputs_that_is_no_multiple_of_32_is_refused():
    with pytest.raises(ValueError, match=r"mxfp4 needs a multiple of 32 input features, not 48; .*quantization\.ignore"):
        MXFP4.encode(torch.ones(2, 48))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_activations_that_are_not_finite_do_not_come_out_finite(bad):
    x = torch.ones(2, 64)
    x[1, 3] = bad
    out = MXFP4.linear(x, MXFP4.encode(torch.ones(3, 64)))
    assert out[0].isfinite().all() and out[1].isnan().all()
