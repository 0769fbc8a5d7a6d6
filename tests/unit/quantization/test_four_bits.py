"""NVFP4, INT4 and NF4 against loops in float64."""

import math

import pytest
import torch

from qurl.quantization import FORMATS
from qurl.quantization.nf4 import NUMBERS
from qurl.quantization.packing import unpack

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1_BY_CODE = [*E2M1, *(-number for number in E2M1)]


def weights(rows: int, columns: int) -> torch.Tensor:
    """Several magnitudes."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-1, rows - 1)[:, None]


def e4m3_values() -> list[float]:
    """Positive E4M3FN numbers, ascending."""
    numbers = [(byte & 7) / 8 * 2.0**-6 if byte < 8 else (1 + (byte & 7) / 8) * 2.0 ** ((byte >> 3) - 7) for byte in range(1, 0x7F)]
    assert numbers == sorted(numbers) and numbers[-1] == 448.0
    return numbers


def nearest(numbers: list[float], target: float) -> float:
    return min(numbers, key=lambda number: abs(number - target))


def test_nvfp4_weights_equal_the_loop():
    matrix = weights(4, 48)
    wire = FORMATS["nvfp4"].encode(matrix)
    global_scale = 6 * 448 / float(matrix.abs().max())
    assert float(wire["weight_global_scale"]) == pytest.approx(global_scale, rel=1e-6)
    codes, decoded = unpack(wire["weight"]), FORMATS["nvfp4"].decode(wire)
    for row in range(4):
        for column in range(48):
            group = matrix[row, column // 16 * 16 :][:16].double()
            scale = nearest(e4m3_values(), float(group.abs().max()) / 6 * global_scale)
            assert float(wire["weight_scale"][row, column // 16].float()) == scale  # there is no tie here
            target = float(matrix[row, column]) * global_scale / scale
            number = E2M1_BY_CODE[int(codes[row, column])]
            assert abs(number - target) <= abs(nearest(E2M1_BY_CODE, target) - target) + 1e-5
            assert math.copysign(1, number) == math.copysign(1, target)
            assert float(decoded[row, column]) == pytest.approx(number * scale / global_scale, rel=1e-6)


def test_nvfp4_tokens_have_scales_of_their_own():
    x = weights(4, 48)
    codes, scale = FORMATS["nvfp4"].quantize_activations(x)
    for row in range(4):
        wire = FORMATS["nvfp4"].encode(x[row : row + 1])
        held = (codes[row].view(3, 16) * scale[row][:, None]).flatten()
        assert torch.equal(held, FORMATS["nvfp4"].decode(wire)[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_nvfp4_token_that_is_not_finite_does_not_come_out_finite(bad):
    x = torch.ones(2, 32)
    x[1, 3] = bad
    out = FORMATS["nvfp4"].linear(x, FORMATS["nvfp4"].encode(torch.ones(3, 32)))
    assert out[0].isfinite().all() and not out[1].isfinite().any()


@pytest.mark.parametrize(("name", "group", "largest"), [("int4", 128, 7.0), ("nf4", 64, 1.0)])
def test_weight_only_formats_take_the_nearest_number_under_a_scale_rounded_up(name, group, largest):
    matrix = weights(4, 256)
    wire = FORMATS[name].encode(matrix)
    numbers = [float(code - 8) for code in range(16)] if name == "int4" else list(NUMBERS)
    codes, decoded = unpack(wire["weight"]), FORMATS[name].decode(wire)
    assert wire["weight_scale"].dtype == torch.bfloat16 and wire["weight_scale"].shape == (4, 256 // group)
    for row in range(4):
        for column in range(256):
            amax = float(matrix[row, column // group * group :][:group].abs().max())
            scale = float(wire["weight_scale"][row, column // group])
            assert amax / largest * (1 - 1e-7) <= scale <= amax / largest * (1 + 2**-7)
            target = float(matrix[row, column]) / scale
            number = numbers[int(codes[row, column])]
            assert abs(number - target) <= min(abs(n - target) for n in numbers) + 1e-6 and abs(number) <= largest
            assert float(decoded[row, column]) == pytest.approx(number * scale, rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_weight_only_formats_leave_activations_alone(name):
    x, matrix, bias = weights(3, 128).bfloat16(), weights(5, 128), torch.arange(5.0)
    wire = FORMATS[name].encode(matrix)
    expected = x.double() @ FORMATS[name].decode(wire).double().T + bias.double()
    size = x.double().abs() @ FORMATS[name].decode(wire).double().abs().T
    found = FORMATS[name].linear(x, wire, bias)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - expected).abs() <= 2**-8 * expected.abs() + 128 * 2**-24 * size).all()
    assert FORMATS[name].quantize_activations(x)[0] is x


def test_nf4_is_its_table():
    assert sorted(NUMBERS) == list(NUMBERS) and len(NUMBERS) == 16 and NUMBERS[7] == 0.0
    wire = FORMATS["nf4"].encode(torch.tensor(NUMBERS).repeat(1, 4))
    assert unpack(wire["weight"])[0].tolist() == 4 * list(range(16))


@pytest.mark.parametrize(("name", "multiple"), [("nvfp4", 16), ("int4", 128), ("nf4", 64)])
def test_a_number_of_inputs_that_is_no_multiple_of_the_group_is_refused(name, multiple):
    with pytest.raises(ValueError, match=rf"{name} needs a multiple of {multiple} input features, not 24; .*quantization\.ignore"):
        FORMATS[name].encode(torch.ones(2, 24))
