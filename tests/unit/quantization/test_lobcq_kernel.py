"""Compiled LO-BCQ loops against the format, and against a loop that takes sums in the order they promise."""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_libraries import libraries

from qurl.quantization import FORMATS
from qurl.quantization.hadamard import SIZES, rotate
from qurl.quantization.kernels.cpu import library
from qurl.quantization.kernels.cpu.library import PATHS, KernelsUnavailable
from qurl.quantization.kernels.cpu.lobcq import LoBcqKernel
from qurl.quantization.lobcq import Codebooks, CodebookSets, LayerCodebooks, Layout, LoBcq
from qurl.quantization.packing import pack, pack_bits, unpack, unpack_bits
from qurl.quantization.rotation import with_rotation

LIBRARIES = libraries()


def of_operands(weights, activations):
    """With codebooks of one format for weights and of another for activations."""
    codebooks = LayerCodebooks(weights=FORMATS[weights].codebooks.weights, activations=FORMATS[activations].codebooks.weights)
    return LoBcq(f"{weights} times {activations}", FORMATS[weights].layout, CodebookSets.of_every_layer(codebooks))


CASES = {name: FORMATS[name] for name in ("lobcq", "lobcq_int8", "lobcq_w4a16")}
CASES |= {"w6a8": of_operands("lobcq", "lobcq_int8"), "w8a6": of_operands("lobcq_int8", "lobcq")}
KERNELS = {(name, path): LoBcqKernel(format, held) for name, format in CASES.items() for path, held in LIBRARIES.items()}
W4A4 = [name for name, format in CASES.items() if not format.keeps_activations]
LAYOUTS = [Layout(array=16, num_codebooks=8), Layout(array=32, num_codebooks=2), Layout(num_codebooks=4),
           Layout(array=128, num_codebooks=1), Layout(array=128), Layout(array=128, codeword_bits=8)]  # fmt: skip
LAYOUTS += [Layout(block=block, array=array, num_codebooks=books, codeword_bits=bits) for block, array, books, bits in (
    (4, 64, 4, 6), (4, 64, 2, 8), (4, 16, 1, 6), (4, 128, 8, 8), (4, 32, 16, 6),
    (2, 64, 2, 6), (2, 128, 4, 6), (2, 32, 1, 8), (2, 16, 8, 6), (2, 64, 16, 8),
)]  # fmt: skip
SHAPES = [(1, 64, 1), (7, 64, 5), (8, 128, 33), (13, 192, 2), (31, 320, 16), (9, 640, 70), (65, 64, 3), (24, 1088, 4)]


@pytest.fixture(params=list(KERNELS), ids="-".join)
def case(request):
    return CASES[request.param[0]], KERNELS[request.param]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(wire):
    """Wire tensors with one row per output feature."""
    return wire | {"weight_global_scale": wire["weight_global_scale"].view(1, 1).expand(len(wire["weight"]), 1)}


def in_order(format, x, rows):
    """What `linear` promises, bit for bit: x [T, I] float32 -> [T, O] float32."""
    length, bits = format.layout.block, format.layout.selector_bits
    blocks = 2 * rows["weight"].shape[1] // length
    books = unpack_bits(rows["weight_selector"], bits, blocks).long() if bits else torch.zeros(len(rows["weight"]), blocks).long()
    entries = books[:, :, None] * 16 + unpack(rows["weight"]).unflatten(1, (-1, length)).long()
    weights = format.codebooks.weights.table[entries].flatten(1)
    weights, weight_scales = format.grouped(weights), rows["weight_scale"].float()
    row_scales = 1.0 / rows["weight_global_scale"].double().T
    total = torch.zeros(len(x), len(weights))
    if format.keeps_activations:
        exponents = torch.frexp(format.grouped(x).abs().amax(dim=-1)).exponent.double()  # [T, arrays]
        numbers = (format.grouped(x).double() * 2.0 ** (22.0 - exponents)[..., None]).round()
        totals = []
        for digit in range(3):
            codes = (numbers + 128.0).remainder(256.0) - 128.0
            numbers = (numbers - codes) / 256.0
            totals.append(total.clone())
            for g in range(codes.shape[1]):
                scale = (2.0 ** (exponents[:, g, None] + 8.0 * digit)).float()
                totals[-1] += (codes[:, g].double() @ weights[:, g].double().T).float() * (scale * weight_scales[None, :, g])
        assert not numbers.any()
        return (sum(part.double() for part in totals) * row_scales * 2.0**-22).float()
    codewords, scales = format.quantize_activations(x)
    amax = x.abs().amax(dim=1, keepdim=True)
    token_scale = (torch.full_like(amax, 448.0 * format.codebooks.activations.layout.largest) / amax).clamp(max=2.0**100)
    for g, codes in enumerate(format.grouped(codewords).unbind(1)):
        scale = (scales[:, g, None] * token_scale).to(torch.float8_e4m3fn).float()  # the E4M3 number again
        total += (codes.double() @ weights[:, g].double().T).float() * (scale * weight_scales[None, :, g])
    return (total.double() * (row_scales * (1.0 / token_scale.double()))).float()


def assert_in_order(format, kernel, rows, columns, tokens):
    weight = normal(rows, columns, seed=rows) * (0.5 * normal(rows, 1)).exp()
    weight[0, 64:128], weight[rows // 2] = 0.0, 0.0
    x = normal(tokens, columns, seed=columns) * (normal(1, columns, seed=3)).exp()
    x[-1, :64], x[tokens // 2] = 0.0, 0.0
    matrix, bias = rows_of(format.encode(weight)), normal(rows, seed=5)
    packed = kernel.pack(matrix)
    layout = format.layout
    selector_bits = 4 if layout.block == 8 or layout.num_codebooks > 4 else layout.selector_bits
    bits_per_weight = 4 + selector_bits / layout.block + 8 / layout.array
    assert packed.nbytes == math.ceil(rows / 8) * 8 * (bits_per_weight * columns / 8 + 8)
    unpacked = kernel.unpack(packed, rows, columns)
    assert list(unpacked) == list(matrix) and all(torch.equal(unpacked[name].float(), matrix[name].float()) for name in matrix)
    expected = in_order(format, x, matrix)
    assert torch.equal(kernel.linear(x, packed, rows, None), expected)
    assert torch.equal(kernel.linear(x, packed, rows, bias), expected + bias)
    exact = format.round_activations(x).double() @ format.decode(format.encode(weight)).double().T
    magnitude = format.round_activations(x).double().abs() @ format.decode(format.encode(weight)).double().abs().T
    num_terms = columns / format.layout.array + 12  # float32 sums and scales
    assert ((expected - exact).abs() <= num_terms * 2.0**-24 * magnitude).all()
    half = x.bfloat16()
    assert torch.equal(kernel.linear(half, packed, rows, bias.bfloat16()),
                       (in_order(format, half.float(), matrix) + bias.bfloat16().float()).bfloat16())  # fmt: skip


@pytest.mark.parametrize("rows,columns,tokens", SHAPES)
def test_results_are_those_of_a_loop_in_the_promised_order_bit_for_bit(case, rows, columns, tokens):
    assert_in_order(*case, rows, columns, tokens)


def hard_tokens(format):
    """Tokens where rounding is close: ties, equal books, extremes of float32, arrays that vanish beside others."""
    wide = normal(6, 256, seed=1) * (3 * normal(6, 256, seed=2)).exp()
    largest = format.codebooks.activations.layout.largest
    ties = torch.randint(-2 * largest, 2 * largest + 1, (6, 256), generator=torch.Generator().manual_seed(3)) / 2.0
    ties[:, ::64] = largest  # every array gets the scale for which these are halves of codewords
    steps = torch.tensor([1.0, 2.0**-6, 2.0**-9, 2.0**-10, 2.0**-11, 0.0])[:, None] * normal(6, 64, seed=4)
    vanishing = torch.cat([normal(6, 64), steps, steps * 1.1, steps * 0.9], dim=1)
    return torch.cat([wide, wide * 1e-38, wide * 1e-42, normal(6, 256) * 8e37, ties, ties * 0.37, vanishing, torch.zeros(1, 256)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", LIBRARIES)
@pytest.mark.parametrize("name", W4A4)
def test_activations_are_quantized_bit_for_bit_as_the_format_does(name, path, dtype):
    x = torch.cat([hard_tokens(CASES[name]), normal(64, 256, seed=9)]).to(dtype)
    codes, scales = KERNELS[name, path].quantize_activations(x)
    expected_codes, expected_scales = CASES[name].quantize_activations(x)
    assert torch.equal(codes.float(), expected_codes) and torch.equal(scales, expected_scales)


@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_rotated_before_all_else_bit_for_bit_as_the_format_does(case, size):
    format, kernel = case
    rotated = with_rotation(format, size)
    other = LoBcqKernel(rotated, kernel._library)
    x = normal(11, 384) * (2 * normal(11, 384, seed=1)).exp()
    x[3, :128], x[5, 0], x[6] = 0.0, math.nan, 1.0
    matrix = rows_of(rotated.encode(normal(20, 384, seed=2)))
    packed = kernel.pack(matrix)
    for tokens in (x, x.bfloat16()):
        expected = kernel.linear(rotate(tokens.float(), size), packed, 20, None).to(tokens.dtype)
        found = other.linear(tokens, packed, 20, None)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert not found[5].isfinite().any() and torch.equal(other.linear(tokens[:1], packed, 20, None), found[:1])
    if not format.keeps_activations:
        finite = x[[0, 1, 2, 3, 4, 6]]
        codes, scales = other.quantize_activations(finite)
        expected_codes, expected_scales = rotated.quantize_activations(finite)
        assert torch.equal(codes.float(), expected_codes) and torch.equal(scales, expected_scales)


def test_all_sets_of_instructions_give_the_same_bits():
    for name in CASES:
        matrix = rows_of(CASES[name].encode(normal(21, 256)))
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.cat([hard_tokens(CASES[name]), normal(64, 256, seed=9)]).to(dtype)
            results = [KERNELS[name, path].linear(x, KERNELS[name, path].pack(matrix), 21, None) for path in LIBRARIES]
            assert all(torch.equal(result, results[0]) for result in results)


def assert_no_overflow(format, kernel):
    """Codewords that are all of the largest magnitude, with either sign."""
    layout = format.layout
    extreme = [(k, book.index(entry)) for k, book in enumerate(format.codebooks.weights.entries)
               for entry in (book[0], book[-1]) if abs(entry) == layout.largest]  # fmt: skip
    codes = torch.tensor([[code] * 256 for _, code in extreme], dtype=torch.uint8)
    matrix = {"weight": pack(codes)}
    if layout.selector_bits:
        books = torch.tensor([[k] * (256 // layout.block) for k, _ in extreme], dtype=torch.uint8)
        matrix["weight_selector"] = pack_bits(books, layout.selector_bits)
    matrix["weight_scale"] = torch.full((len(extreme), 256 // layout.array), 448.0).to(torch.float8_e4m3fn)
    matrix["weight_global_scale"] = torch.ones(len(extreme), 1)
    x = torch.tensor([[1.0], [-1.0]]).expand(2, 256) * 100.0
    assert extreme and torch.equal(kernel.linear(x, kernel.pack(matrix), len(extreme), None), in_order(format, x, matrix))


def test_the_largest_sums_do_not_overflow(case):
    assert_no_overflow(*case)


def even_codebooks(layout):
    """Entries at equal distances; the last book is the widest."""
    widths = range(layout.largest - layout.num_codebooks + 1, layout.largest + 1)
    books = tuple(tuple(round(width * (2 * c - 15) / 15) for c in range(16)) for width in widths)
    return Codebooks(layout=layout, entries=books)


@pytest.mark.parametrize("path", LIBRARIES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.file_name.removesuffix(".json"))
def test_other_blocks_and_arrays_and_fewer_books_keep_the_same_promises(layout, path):
    for keeps_activations in (False, True):
        format = LoBcq("other", layout, even_codebooks(layout), keeps_activations)
        kernel = LoBcqKernel(format, LIBRARIES[path])
        for rows, columns, tokens in ((1, 128, 1), (13, 384, 6), (21, 1152, 2)):
            assert_in_order(format, kernel, rows, columns, tokens)
        assert_no_overflow(format, kernel)
        if not keeps_activations:
            codes, scales = kernel.quantize_activations(hard_tokens(format))
            expected_codes, expected_scales = format.quantize_activations(hard_tokens(format))
            assert torch.equal(codes.float(), expected_codes) and torch.equal(scales, expected_scales)


def test_a_token_s_result_depends_neither_on_its_neighbors_nor_on_threads(case):
    format, kernel = case
    packed = kernel.pack(rows_of(format.encode(normal(40, 192))))
    x = normal(67, 192, seed=1).bfloat16()
    together, threads = kernel.linear(x, packed, 40, None), torch.get_num_threads()
    for num_tokens in (1, 2, 3, 4, 5, 7):
        assert torch.equal(torch.cat([kernel.linear(part, packed, 40, None) for part in x.split(num_tokens)]), together)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(kernel.linear(x, packed, 40, None), together)
            assert torch.equal(kernel.linear(x[:1], packed, 40, None), together[:1])
    finally:
        torch.set_num_threads(threads)


def test_a_token_that_is_not_finite_spoils_its_own_results_alone(case):
    format, kernel = case
    wire = format.encode(normal(12, 192))
    x = normal(6, 192, seed=1)
    x[1, 3], x[2, 70], x[4, 191] = math.nan, math.inf, -math.inf
    out = kernel.linear(x, kernel.pack(rows_of(wire)), 12, normal(12))
    assert torch.equal(out.isfinite(), format.linear(x, wire, normal(12)).isfinite())
    assert not out[[1, 2, 4]].isfinite().any() and out[[0, 3, 5]].isfinite().all()


def test_any_layout_of_x_and_any_dtype_is_taken(case):
    format, kernel = case
    packed = kernel.pack(rows_of(format.encode(normal(16, 128))))
    x, bias = normal(128, 6, seed=1).half().T, normal(16).half()
    expected = kernel.linear(x.float().contiguous(), packed, 16, bias.float()).half()
    assert torch.equal(kernel.linear(x, packed, 16, bias), expected)
    assert kernel.linear(x[:0].bfloat16(), packed, 16, None).shape == (0, 16)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache with nothing in it; a compiler that copies the library at hand and notes that it ran."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("QURL_CPU_KERNELS", raising=False)
    compiled = library._compiled()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    script = tmp_path / "compiler"
    find_output = 'while [ "$1" != -o ]; do shift; done'
    script.write_text(f'#!/bin/sh\n{find_output}\necho ran >> {tmp_path}/log\nsleep 0.2\ncp {compiled} "$2"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return tmp_path


def test_many_that_start_at_once_compile_once(empty_cache):
    with ThreadPoolExecutor(4) as pool:  # locks are between open files, so threads stand for processes
        found = set(pool.map(lambda _: library._compiled(), range(4)))
    assert len(found) == 1 and (empty_cache / "log").read_text() == "ran\n"
    assert found.pop().parent == empty_cache / "cache" / "qurl" / "cpu_kernels"
    assert library._load().path == [path for path in PATHS if path in LIBRARIES][-1]


def test_what_is_missing_and_what_would_help_is_said(empty_cache, monkeypatch):
    def reason(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(KernelsUnavailable) as raised:
            library._load()
        return str(raised.value)

    assert reason(CXX="/nowhere/c++").endswith("set CXX to one that works")
    (empty_cache / "broken").write_text("#!/bin/sh\necho 'lobcq.cpp:1: error: no such thing' >&2\nexit 1\n")
    os.chmod(empty_cache / "broken", 0o755)
    assert "broken failed: lobcq.cpp:1: error: no such thing; set CXX" in reason(CXX=str(empty_cache / "broken"))
    monkeypatch.delenv("CXX")
    assert reason(PATH="") == "there is no C++ compiler; install g++ or set CXX"
    (empty_cache / "file").write_text("")
    assert "set XDG_CACHE_HOME" in reason(XDG_CACHE_HOME=str(empty_cache / "file"), CXX="c++")
    assert reason(QURL_CPU_KERNELS="off") == "QURL_CPU_KERNELS=off"
