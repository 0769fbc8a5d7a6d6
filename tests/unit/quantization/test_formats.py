"""Encode, decode, activations and the reference linear layer of every format."""

import math

import pytest
import torch

from qurl.quantization import FORMATS

QUANTIZED = [name for name in FORMATS if name != "none"]
EIGHT_BITS = ["int8", "fp8", "fp8_block"]
SHAPES = [(1, 1), (3, 130), (128, 128), (129, 127), (200, 384)]


def columns_for(name: str, columns: int) -> int:
    """The next number of columns that the format can encode."""
    block = FORMATS[name].block[1] if FORMATS[name].has_whole_blocks else 1
    return -(-columns // block) * block


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student_t4(*shape: int) -> torch.Tensor:
    """Heavy tails: normal over the root of chi-square(4)/4."""
    chi_square = normal(4, *shape, seed=1).square().sum(0)
    return normal(*shape, seed=2) / (chi_square / 4.0).sqrt()


def e4m3_values() -> list[float]:
    """Every finite E4M3FN number, from its bits: 1 sign, 4 exponent (bias 7), 3 mantissa; 0x7f is NaN."""
    values = []
    for byte in range(0x7F):
        exponent, mantissa = byte >> 3, byte & 7
        value = (mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values += [value, -value]
    return values


def block_of(name: str, row: int, column: int) -> tuple[int, int]:
    """Which scale a weight belongs to."""
    return (row // 128, column // 128) if name == "fp8_block" else (row, 0)


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize("shape", [(3, 130), (130, 5)])
def test_every_weight_gets_the_nearest_code_of_its_group(name, shape):
    weight = normal(*shape)
    wire = FORMATS[name].encode(weight)
    largest = 127.0 if name == "int8" else 448.0
    grid = torch.tensor(range(-127, 128) if name == "int8" else sorted(set(e4m3_values())), dtype=torch.float64)
    amax: dict[tuple[int, int], float] = {}
    for row in range(shape[0]):
        for column in range(shape[1]):
            key = block_of(name, row, column)
            amax[key] = max(amax.get(key, 0.0), abs(float(weight[row, column])))
    for key, value in amax.items():
        assert float(wire["weight_scale"][key]) == pytest.approx(value / largest, rel=1e-7)  # one float32 rounding
    for row in range(shape[0]):
        for column in range(shape[1]):
            target = float(weight[row, column]) / float(wire["weight_scale"][block_of(name, row, column)])
            code = float(wire["weight"][row, column])
            # float32 division may move an exact tie by its last bit
            assert abs(code - target) <= float((grid - target).abs().min()) + 1e-4


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_multiplies_each_code_by_the_scale_of_its_group(name, shape):
    wire = FORMATS[name].encode(normal(*shape))
    decoded = FORMATS[name].decode(wire)
    assert decoded.dtype == torch.float32 and decoded.shape == shape
    for row in range(0, shape[0], 7):
        for column in range(0, shape[1], 11):
            scale = wire["weight_scale"][block_of(name, row, column)]
            assert decoded[row, column] == wire["weight"][row, column].float() * scale


@pytest.mark.parametrize(
    ("name", "floor_normal", "floor_heavy"),
    # The FP8 error hardly depends on tails. INT8 does: the largest of a row of t4 numbers sets the step, and the finite sample of
    # such rows moves the figure by some tenths of a dB. MXFP4 cuts off what is above 6 scales, hence the tails.
    [("int8", 41.0, 31.0), ("fp8", 31.5, 31.5), ("fp8_block", 31.5, 31.5), ("mxfp4", 18.4, 17.5),
     ("nvfp4", 20.0, 20.0), ("int4", 17.0, 12.0), ("nf4", 19.0, 16.0),
     ("lobcq", 23.0, 21.0), ("lobcq_int8", 23.0, 21.0), ("lobcq_w4a16", 23.0, 21.0),
     ("axbxp", 19.0, 18.2), ("axbxp_k2l2", 19.0, 18.2), ("axbxp_k1l3", 18.4, 16.2)],
)
def test_the_signal_to_noise_ratio_of_a_format_stays_above_its_floor(name, floor_normal, floor_heavy):
    for weight, floor in ((normal(512, 4096), floor_normal), (student_t4(512, 4096), floor_heavy)):
        noise = (weight - FORMATS[name].decode(FORMATS[name].encode(weight))).double()
        assert 10 * math.log10(weight.double().square().sum() / noise.square().sum()) > floor


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_encode_sees_the_values_and_not_dtype_or_layout(name, dtype):
    weight = normal(140, columns_for(name, 150)).to(dtype)
    strided = torch.stack([weight.T.contiguous(), torch.zeros_like(weight.T)], dim=2)[..., 0].T
    assert not strided.is_contiguous()
    plain = FORMATS[name].encode(weight.float())
    for suffix, tensor in FORMATS[name].encode(strided).items():
        assert torch.equal(tensor.float(), plain[suffix].float())


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_row_of_zeros_is_exact_and_leaves_its_neighbours_alone(name):
    weight = normal(256, 256)
    weight[:128] = 0.0
    wire = FORMATS[name].encode(weight)
    decoded = FORMATS[name].decode(wire)
    assert torch.equal(decoded[:128], torch.zeros(128, 256))
    assert bool((wire["weight_scale"].float() > 0).all()) or name.startswith("lobcq")  # whose books need not contain 0
    assert torch.equal(decoded[128:], FORMATS[name].decode(FORMATS[name].encode(weight[128:])))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_the_smallest_and_largest_magnitudes_stay_finite(name, magnitude):
    weight = normal(4, columns_for(name, 4)).clamp(-1, 1) * magnitude
    decoded = FORMATS[name].decode(FORMATS[name].encode(weight))
    assert bool(decoded.isfinite().all())
    half_a_step = float(weight.abs().max()) / (14 if name in EIGHT_BITS else 4)  # of E4M3 at its top, and of E2M1
    assert float((decoded - weight).abs().max()) <= max(half_a_step, 1e-38)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name_of_the_problem(name, bad):
    weight = normal(3, columns_for(name, 5))
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="1 values that are NaN or Inf"):
        FORMATS[name].encode(weight)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(3, 4, dtype=torch.int8), torch.zeros(0, 4)])
def test_only_a_floating_point_matrix_can_be_encoded(name, weight):
    with pytest.raises(ValueError, match="non-empty floating-point matrix"):
        FORMATS[name].encode(weight)


@pytest.mark.parametrize("name", [name for name in QUANTIZED if not name.startswith(("lobcq", "axbxp"))])  # whose scales may shrink
def test_encoding_a_decoded_weight_gives_the_same_codes(name):
    wire = FORMATS[name].encode(normal(130, columns_for(name, 140)))
    again = FORMATS[name].encode(FORMATS[name].decode(wire))
    assert torch.equal(again["weight"].view(torch.uint8), wire["weight"].view(torch.uint8))


def test_int8_activations_multiply_by_the_reciprocal_and_round_half_to_even():
    x = normal(40, 33).bfloat16()
    codes, scales = FORMATS["int8"].quantize_activations(x)
    for row in range(40):
        amax = max(abs(float(value)) for value in x[row])
        scale = torch.tensor(amax, dtype=torch.float32) / torch.tensor(127.0)
        assert scales[row, 0] == scale
        for column in range(33):
            product = x[row, column].float() * (torch.tensor(1.0) / scale)
            assert int(codes[row, column]) == round(float(product))  # Python rounds half to even


def test_fp8_activations_have_vllm_s_smallest_scales():
    x = torch.tensor([[1e-6] * 4, [0.0] * 4])
    codes, scales = FORMATS["fp8"].quantize_activations(x)
    assert scales.tolist() == [[pytest.approx(1 / (448 * 512))]] * 2
    assert float(codes[0, 0].float()) == pytest.approx(1e-6 * 448 * 512, rel=1 / 16)  # three bits of mantissa
    assert FORMATS["fp8_block"].quantize_activations(x * 0)[1].tolist() == [[pytest.approx(1e-10 / 448)]] * 2


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_token_of_zeros_gives_zeros(name):
    columns = columns_for(name, 140)
    x = torch.zeros(2, 3, columns)
    wire = FORMATS[name].encode(normal(7, columns))
    assert torch.equal(FORMATS[name].linear(x, wire), torch.zeros(2, 3, 7))
    assert torch.equal(FORMATS[name].linear(x, wire, torch.arange(7.0)), torch.arange(7.0).expand(2, 3, 7))


def test_an_int8_token_too_small_for_a_reciprocal_counts_as_zero():
    codes, _ = FORMATS["int8"].quantize_activations(torch.full((1, 4), 1e-40))
    assert codes.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (260, 131)])
def test_linear_equals_a_float64_loop_over_codes_and_scales(name, inputs, outputs):
    x, weight, bias = normal(2, 2, inputs), normal(outputs, inputs, seed=3), normal(outputs, seed=4)
    wire = FORMATS[name].encode(weight)
    codes, scales = FORMATS[name].quantize_activations(x)
    expected = torch.empty(2, 2, outputs, dtype=torch.float64)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for o in range(outputs):
            total = 0.0
            for k in range(0, inputs, 128):
                part = (codes[i, j, k : k + 128].double() * wire["weight"][o, k : k + 128].double()).sum()
                x_scale = scales[i, j, k // 128 if name == "fp8_block" else 0].double()
                total += float(part * x_scale * wire["weight_scale"][block_of(name, o, k)].double())
            expected[i, j, o] = total + float(bias[o])
    actual = FORMATS[name].linear(x, wire, bias)
    # float32 sums of up to 260 products of size one
    assert torch.allclose(actual.double(), expected, rtol=1e-5, atol=1e-5 * math.sqrt(inputs))


@pytest.mark.parametrize("name", list(FORMATS))
def test_linear_keeps_shape_and_dtype_and_batch_rows_do_not_mix(name):
    columns = columns_for(name, 130)
    wire = FORMATS[name].encode(normal(6, columns))
    x = normal(4, columns).bfloat16()
    together = FORMATS[name].linear(x, wire)
    assert together.dtype == torch.bfloat16 and together.shape == (4, 6)
    for row in range(4):  # another batch size may sum in another order: one bfloat16 step
        assert torch.allclose(FORMATS[name].linear(x[row], wire).float(), together[row].float(), rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_per_weight_counts_what_is_on_the_wire(name, shape):
    shape = (shape[0], columns_for(name, shape[1]))
    wire = FORMATS[name].encode(normal(*shape))
    assert FORMATS[name].bits_per_weight(shape) == pytest.approx(8 * sum(t.nbytes for t in wire.values()) / math.prod(shape))


def test_full_precision_travels_as_it_is():
    weight = normal(3, 4).bfloat16()
    wire = FORMATS["none"].encode(weight)
    assert wire.keys() == {"weight"} and wire["weight"].data_ptr() == weight.data_ptr()
    assert torch.equal(FORMATS["none"].decode(wire), weight.float())
    assert FORMATS["none"].compressed_tensors_config([]) is None and FORMATS["none"].bits_per_weight((3, 4)) == 16


def test_a_format_is_known_by_its_own_name():
    assert {key: value.name for key, value in FORMATS.items()} == {key: key for key in FORMATS}
