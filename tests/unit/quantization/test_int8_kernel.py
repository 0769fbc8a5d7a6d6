"""Compiled loops over INT8 codes and kept blocks of them, against whole numbers and the format's own float32 arithmetic."""

import math

import pytest
import torch
from kernel_libraries import libraries

from qurl.quantization import FORMATS
from qurl.quantization.axbxp import PackedAxBxP, parse
from qurl.quantization.kernels.cpu.int8 import MOST_COLUMNS, Int8Kernel, has_kernel

LIBRARIES = libraries()
INT8 = FORMATS["int8"]
PACKED = [PackedAxBxP(name, parse(setting)) for name, setting in [
    ("axbxp_k2l2", "k2-w2g16-a4"), ("axbxp_k1l3", "k1-w3g16-a7"), ("k1l4", "k1-w4g16-a7"), ("k3l1", "k3-w1g16-a3"),
    ("k4l1", "k4-w1g16-a2-truncated"),
]]  # fmt: skip
SHAPES = [(1, 16, 1), (7, 32, 5), (8, 48, 33), (13, 208, 2), (31, 320, 16), (9, 640, 70), (65, 64, 3), (24, 1088, 4)]


@pytest.fixture(params=LIBRARIES)
def path(request):
    return LIBRARIES[request.param]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def any_codes(*shape, seed=0, lowest=-128):
    return torch.randint(lowest, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def expected_product(codes, scales, weight, weight_scales, bias, dtype):
    """What the loops promise, bit for bit: whole sums, then float32."""
    total = torch.stack([(weight.long() * token.long()).sum(dim=1) for token in codes])
    out = total.float() * scales * weight_scales.T
    return (out if bias is None else out + bias.float()).to(dtype)


@pytest.mark.parametrize("rows,columns,tokens", [*SHAPES, (5, 1, 2), (3, 33, 9), (10, 127, 6), (2, 31, 1)])
def test_products_of_all_codes_are_exact(path, rows, columns, tokens):
    kernel, weight, codes = Int8Kernel(INT8, path), any_codes(rows, columns), any_codes(tokens, columns, seed=1)
    weight[0], codes[-1] = -128, -128
    weight[rows // 2], codes[tokens // 2, : columns // 2] = 0, 0
    packed, scale = kernel.pack({"weight": weight}), normal(rows, 1).exp()
    assert packed.nbytes == math.ceil(rows / 8) * math.ceil(columns / 32) * 256
    assert torch.equal(kernel.unpack(packed, rows, columns), weight)
    token_scale, bias = normal(tokens, 1, seed=2).exp(), normal(rows, seed=3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for added in (None, bias, bias.bfloat16(), bias.half()):
            expected = expected_product(codes, token_scale, weight, scale, added, dtype)
            assert torch.equal(kernel.multiply(codes, token_scale, packed, scale, added, dtype), expected)


@pytest.mark.parametrize("rows,columns,tokens", SHAPES)
@pytest.mark.parametrize("format", PACKED, ids=lambda format: format.name)
def test_kept_blocks_stay_packed_and_are_what_they_expand_to(path, format, rows, columns, tokens):
    any_weight = any_codes(rows, columns, lowest=-127)
    any_weight[0], any_weight[rows // 2] = -127, 0
    kernel, wire = Int8Kernel(format, path), format.pack(any_weight)
    codes, scale = format.codes(wire), normal(rows, 1).exp()
    packed, x = kernel.pack(wire), any_codes(tokens, columns, seed=1)
    bits = 4 + (format.magnitude_bits == 4) + format.index_bits / 16
    assert packed.nbytes == math.ceil(rows / 8) * 8 * math.ceil(columns / 32) * 32 * bits / 8
    assert torch.equal(kernel.unpack(packed, rows, columns), codes)
    x[-1] = -128
    token_scale, bias = normal(tokens, 1, seed=2).exp(), normal(rows, seed=3)
    expected = expected_product(x, token_scale, codes, scale, bias, torch.float32)
    assert torch.equal(kernel.multiply(x, token_scale, packed, scale, bias, torch.float32), expected)


@pytest.mark.parametrize("format", [INT8, *PACKED], ids=lambda format: format.name)
def test_neighbouring_products_do_not_saturate(path, format):
    """Codes of the largest magnitude whose signs go with each other, against each other, or change every 1, 2, 4, ... columns."""
    columns = torch.arange(144)
    signs = torch.stack([1 - 2 * (columns >> i & 1) for i in range(8)] + [1 + 0 * columns, 0 * columns])
    weight = 127 * torch.cat([signs, -signs]).to(torch.int8)
    x = torch.cat([127 * signs, -128 * signs.clamp(min=0)]).to(torch.int8)
    wire = {"weight": weight} if format is INT8 else format.pack(weight)
    kernel, ones = Int8Kernel(format, path), torch.ones(20, 1)
    expected = expected_product(x, ones, weight if format is INT8 else format.codes(wire), ones, None, torch.float32)
    for count in (1, 3, 20):
        found = kernel.multiply(x[-count:], ones[:count], kernel.pack(wire), ones, None, torch.float32)
        assert torch.equal(found, expected[-count:])


@pytest.mark.parametrize("format", [INT8, *PACKED[:2]], ids=lambda format: format.name)
def test_the_largest_sums_do_not_overflow(path, format):
    """All of one sign, of the largest magnitude, as many as there may be."""
    columns = MOST_COLUMNS if format is INT8 else MOST_COLUMNS // 16 * 16
    kernel, lowest = Int8Kernel(format, path), -128 if format is INT8 else -127
    codes = torch.tensor([[lowest], [127]], dtype=torch.int8).expand(2, columns).contiguous()
    wire = {"weight": codes} if format is INT8 else format.pack(codes)
    weight = codes if format is INT8 else format.codes(wire)
    x = torch.tensor([[-128], [127], [-128], [127], [-128]], dtype=torch.int8).expand(5, columns)
    packed, ones = kernel.pack(wire), torch.ones(2, 1)
    for count in (1, 5):
        expected = (x[:count].double() @ weight.double().T).float()
        assert torch.equal(kernel.multiply(x[:count], torch.ones(count, 1), packed, ones, None, torch.float32), expected)


def test_a_layer_whose_sums_could_overflow_is_refused():
    with pytest.raises(ValueError, match="131072 inputs has sums beyond 32 bits.* quantization.ignore"):
        Int8Kernel(INT8, LIBRARIES["portable"]).pack({"weight": torch.zeros(1, MOST_COLUMNS + 1, dtype=torch.int8)})


def hard_tokens(columns):
    """Ties, extremes of float32, zeros."""
    ties = any_codes(8, columns).float() / 2.0
    ties[:, 0] = 127.0
    wide = normal(8, columns, seed=1) * (3 * normal(8, columns, seed=2)).exp()
    huge = (wide * 1e35).clamp(-3e38, 3e38)
    return torch.cat([ties, ties * 0.37, wide, wide * 1e-38, wide * 1e-42, huge, torch.zeros(1, columns)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 13, 64, 250])
def test_activations_are_quantized_bit_for_bit_as_int8_does(path, columns, dtype):
    x = hard_tokens(columns).to(dtype)
    codes, scales = Int8Kernel(INT8, path).quantize_activations(x)
    expected_codes, expected_scales = INT8.quantize_activations(x)
    assert torch.equal(codes, expected_codes) and torch.equal(scales, expected_scales)


@pytest.mark.parametrize("format", [INT8, *PACKED], ids=lambda format: format.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_is_the_format_s_arithmetic_bit_for_bit(path, format, dtype):
    wire = format.encode(normal(21, 208))
    kernel = Int8Kernel(format, path)
    packed, bias = kernel.pack(wire), normal(21).to(dtype)
    x = torch.cat([hard_tokens(208).clamp(-6e4, 6e4), normal(70, 208, seed=3)]).to(dtype)
    for count in (1, 3, 4, len(x)):
        found = kernel.linear(x[-count:], packed, wire["weight_scale"], bias)
        assert torch.equal(found, format.linear(x[-count:], wire, bias)) and found.dtype == dtype


@pytest.mark.parametrize("format", [INT8, PACKED[0]], ids=lambda format: format.name)
def test_a_token_s_result_depends_neither_on_its_neighbors_nor_on_threads(path, format):
    kernel, wire, threads = Int8Kernel(format, path), format.encode(normal(40, 192)), torch.get_num_threads()
    packed, x = kernel.pack(wire), normal(67, 192, seed=1).bfloat16()
    together = kernel.linear(x, packed, wire["weight_scale"], None)
    for num_tokens in (1, 2, 3, 4, 5, 7):
        parts = [kernel.linear(part, packed, wire["weight_scale"], None) for part in x.split(num_tokens)]
        assert torch.equal(torch.cat(parts), together)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(kernel.pack(wire), packed)
            assert torch.equal(kernel.linear(x, packed, wire["weight_scale"], None), together)
            assert torch.equal(kernel.linear(x[:1], packed, wire["weight_scale"], None), together[:1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("format", [INT8, PACKED[0]], ids=lambda format: format.name)
def test_a_token_that_is_not_finite_spoils_its_own_results_alone(path, format):
    wire, x, kernel = format.encode(normal(12, 192)), normal(6, 192, seed=1), Int8Kernel(format, path)
    x[1, 3], x[2, 70], x[4, 191] = math.nan, math.inf, -math.inf
    out = kernel.linear(x, kernel.pack(wire), wire["weight_scale"], normal(12))
    expected = format.linear(x, wire, normal(12))
    assert not out[[1, 2, 4]].isfinite().any() and not expected[[1, 2, 4]].isfinite().any()
    assert torch.equal(out[[0, 3, 5]], expected[[0, 3, 5]])


def test_any_layout_of_x_is_taken_and_none_at_all(path):
    kernel, wire = Int8Kernel(INT8, path), INT8.encode(normal(16, 100))
    packed, scale, x = kernel.pack({"weight": wire["weight"].T.contiguous().T}), wire["weight_scale"], normal(100, 6, seed=1).T
    assert torch.equal(kernel.linear(x, packed, scale, None), INT8.linear(x, wire))
    codes, token_scale = INT8.quantize_activations(x)
    found = kernel.multiply(codes.T.contiguous().T, token_scale, packed, scale, None, torch.float32)
    assert torch.equal(found, INT8.linear(x, wire))
    assert kernel.linear(x[:0], packed, scale, None).shape == (0, 16)


def test_other_formats_and_groups_have_no_kernel():
    assert all(map(has_kernel, [INT8, *PACKED, FORMATS["axbxp_k2l2"], FORMATS["axbxp_k1l3"]]))
    others = [FORMATS[name] for name in ("none", "fp8", "axbxp", "lobcq", "nf4")]
    assert not any(map(has_kernel, [*others, PackedAxBxP("any", parse("k2-w2g32-a4"))]))
