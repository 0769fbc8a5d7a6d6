"""LO-BCQ's Triton kernels on the CPU, under Triton's interpreter: run by test_lobcq_triton.py, in a process of its own."""

import math
import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from test_lobcq import VARIANTS, any_format, normal
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from qurl.quantization import FORMATS, resolved_format
from qurl.quantization.hadamard import SIZES, rotate
from qurl.quantization.kernels.triton import codebook_bytes, lobcq_encode, lobcq_matmul, nearest_codewords, rotated
from qurl.quantization.kernels.triton.codewords import PERMUTE
from qurl.quantization.kernels.triton.encode import _to_e4m3
from qurl.quantization.kernels.triton.matmul import SMALLEST_ARRAY, num_splits
from qurl.quantization.lobcq import Codebooks, CodebookSets, LayerCodebooks, Layout, LoBcq

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy divides by 0 where a GPU does
LAYOUTS = [*VARIANTS[1:], Layout(block=4, array=32, num_codebooks=8)]
OPERANDS = LoBcq("of operands", Layout(), CodebookSets.of_every_layer(LayerCodebooks(
    weights=FORMATS["lobcq"].codebooks.weights, activations=FORMATS["lobcq_int8"].codebooks.activations
)))  # fmt: skip
FORMATS_HERE = [FORMATS["lobcq"], FORMATS["lobcq_int8"], OPERANDS, *map(any_format, LAYOUTS)]
MULTIPLIED = [format for format in FORMATS_HERE if format.layout.array >= SMALLEST_ARRAY]


FLOATS = (torch.float16, torch.float32)


def label(value):
    """Of a format, in a test's name."""
    if not isinstance(value, LoBcq):
        return None
    layout = value.layout
    name = f"lb{layout.block}_la{layout.array}_nc{layout.num_codebooks}_int{layout.codeword_bits}"
    return name if value is not OPERANDS else f"{name}_of_operands"


def prmt(a, b, selector):
    """PTX's byte permute: byte s & 7 of b:a for each selector s, or eight copies of its sign where s & 8."""
    source = [(word >> (8 * index)) & 255 for word in (a, b) for index in range(4)]
    found = np.zeros_like(a)
    for place in range(4):
        chosen = (selector >> (4 * place)) & 15
        byte = np.choose(chosen & 7, source)
        byte = np.where(chosen & 8, (byte >> 7) * 255, byte)
        found |= byte << (8 * place)
    return found


PTX = {"and": np.bitwise_and, "or": np.bitwise_or, "shr": np.right_shift, "prmt": prmt}


def run_ptx(assembly, inputs):
    """$0 and $1 of straight-line PTX on 32-bit registers; inputs: $2 and following, int64 arrays below 2^32."""
    registers = {f"${index + 2}": value for index, value in enumerate(inputs)}
    for line in re.findall(r"^(?!\.reg)([a-z]+\.b32 [^;]+);$", assembly, flags=re.MULTILINE):
        operation, arguments = line.split(".b32 ")
        target, *sources = (name.strip() for name in arguments.split(","))
        values = [registers[name] if name in registers else np.int64(int(name, 0)) for name in sources]
        registers[target] = PTX[operation](*values)
    return registers["$0"], registers["$1"]


@pytest.fixture
def ptx(monkeypatch):
    """Inline assembly, which the interpreter lacks."""

    def create_inline_asm(self, assembly, constraints, values, types, is_pure, pack):
        assert constraints == "=&r,=&r,r,r,r,r,r" and pack == 1
        inputs = [value.data.astype(np.int64) & 0xFFFFFFFF for value in values]
        handles = [TensorHandle(found.astype(np.uint32).view(np.int32), tl.int32) for found in run_ptx(assembly, inputs)]
        return type("Call", (), {"get_result": staticmethod(handles.__getitem__)})

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm)


@pytest.fixture
def bfloat16(monkeypatch):
    """What a GPU does with bfloat16: the interpreter takes its bits for whole numbers, and whole numbers for its bits, where it
    multiplies and converts, and cuts float32 off instead of rounding it."""
    create_dot = InterpreterBuilder.create_dot

    def widened(self, a, b, *arguments):
        return create_dot(self, *(self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b)), *arguments)

    def converted(self, source, dtype):
        if dtype.scalar != tl.bfloat16:
            return self.cast_impl(source, dtype)
        bits = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(bits, tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", converted)
    monkeypatch.setattr(InterpreterBuilder, "create_si_to_fp", converted)


def encode(format, x):
    return lobcq_encode(x, nearest_codewords(format.codebooks.activations), format.layout.block, format.layout.array)


def quantized(format, x):
    """What encode must give."""
    codewords, scales = format.quantize_activations(x)
    return codewords.to(torch.int8), scales


def fused(format, sizes, columns, seed=0):
    """Wire tensors of matrices of several magnitudes, and the same with one row per output feature."""
    wires = [format.encode(normal(rows, columns, seed=seed + index) * 10.0**index) for index, rows in enumerate(sizes)]
    stacked = {name: torch.cat([wire[name] for wire in wires]) for name in wires[0] if name != "weight_global_scale"}
    global_scale = torch.cat([wire["weight_global_scale"].expand(rows) for wire, rows in zip(wires, sizes, strict=True)])
    return wires, {**stacked, "weight_global_scale": global_scale[:, None].contiguous()}


def multiply(format, x, x_scales, stacked, bias=None, dtype=torch.float32, permute=False):
    return lobcq_matmul(
        x, x_scales, stacked["weight"], stacked.get("weight_selector"), stacked["weight_scale"], stacked["weight_global_scale"],
        codebook_bytes(format.codebooks.weights), bias, format.layout.block, permute, dtype,
    )  # fmt: skip


def codewords_of(format, wire):
    """[O, I] float32: what decode gives where all scales are 1."""
    ones = {name: torch.ones_like(wire[name].float()) for name in ("weight_scale", "weight_global_scale")}
    return format.decode({**wire, **ones})


def loop(format, x, x_scales, wires):
    """[T, O] float32, one rounding at a time: integer sums of arrays, scaled and added in the order of arrays and splits."""
    codewords = torch.cat([codewords_of(format, wire) for wire in wires]).numpy().astype(np.int64)
    scales = torch.cat([wire["weight_scale"].float() for wire in wires]).numpy()
    global_scale = np.concatenate([np.full(len(wire["weight"]), float(wire["weight_global_scale"]), np.float32) for wire in wires])
    x, x_scales = x.numpy().astype(np.int64), x_scales.numpy()
    rows, arrays = scales.shape
    splits, array = num_splits(rows, arrays), x.shape[1] // arrays
    out = np.zeros((len(x), rows), np.float32)
    for numbers in np.array_split(np.arange(arrays), splits):
        part = np.zeros_like(out)
        for index in numbers:
            columns = slice(index * array, (index + 1) * array)
            sums = (x[:, columns] @ codewords[:, columns].T).astype(np.float32)
            part = part + sums * (scales[:, index] * x_scales[:, index, None])
        out = out + part
    return torch.from_numpy(out / global_scale)


@triton.jit
def e4m3_kernel(x, out, count, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + place, _to_e4m3(tl.load(x + place, mask=place < count, other=0.0)), mask=place < count)


def test_e4m3_is_torch_s_at_all_numbers_between_and_beside_them():
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448
    between = (numbers[:-1] + numbers[1:]) / 2
    exact = torch.cat([numbers, between, torch.tensor([2.0**-149, 2.0**-126, math.nan])])
    x = torch.cat([exact, torch.nextafter(exact, torch.tensor(0.0)), torch.nextafter(exact, torch.tensor(448.0))])
    out = torch.empty_like(x)
    e4m3_kernel[(triton.cdiv(len(x), 256),)](x, out, len(x), SIZE=256)
    torch.testing.assert_close(out, x.to(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)


HALF = [(FORMATS["lobcq"], torch.bfloat16), (FORMATS["lobcq"], torch.float16)]


@pytest.mark.parametrize("format,dtype", [*((format, torch.float32) for format in FORMATS_HERE), *HALF], ids=label)
def test_activations_get_the_reference_s_codewords_and_scales(format, dtype):
    x = (normal(3, 384, seed=3) * torch.tensor([1.0, 300.0, 0.0])[:, None]).to(dtype)
    x[0, :128] = 0.0  # arrays of zeros
    x[1, ::96] *= 50.0  # outliers
    codewords, scales = encode(format, x)
    expected, expected_scales = format.quantize_activations(x)
    assert torch.equal(codewords.float(), expected) and torch.equal(scales, expected_scales)
    assert len(codewords[0].unique()) > 4


@pytest.mark.parametrize("size", SIZES)
def test_rotated_activations_have_the_reference_s_bits_and_then_its_codewords(bfloat16, size):
    x = (normal(3, 1152) * torch.tensor([1.0, 1e-30, 300.0])[:, None]).to(torch.float16)  # more than a program rotates
    x[0, 7], x[2, :256] = math.nan, 0.0
    found = rotated(x, size, torch.float32)
    torch.testing.assert_close(found, rotate(x.float(), size), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(rotated(x[1:], size, torch.bfloat16), rotate(x[1:].float(), size).bfloat16())
    codewords, scales = encode(FORMATS["lobcq"], found[1:])
    expected, expected_scales = resolved_format("lobcq", rotation=size).quantize_activations(x[1:])
    assert torch.equal(codewords.float(), expected) and torch.equal(scales, expected_scales)


@pytest.mark.parametrize("name", ["lobcq", "lobcq_int8"])
def test_tokens_of_any_size_and_numbers_halfway_between_codewords(name):
    format, columns = FORMATS[name], 1088  # more than a program encodes
    largest = format.layout.largest
    halves = torch.randint(-2 * largest, 2 * largest + 1, (columns,), generator=torch.Generator().manual_seed(1)) / 2.0
    halves[::64] = largest  # all scales are 448 over 448, so every number is its own multiple
    x = torch.stack([halves, *(size * normal(columns) for size in (1e-37, 1e-42, 1e36))])
    codewords, scales = encode(format, x)
    expected, expected_scales = format.quantize_activations(x)
    assert torch.equal(codewords.float(), expected) and torch.equal(scales, expected_scales)


def test_the_first_of_equally_good_books_wins():
    layout = Layout(block=2, array=32, num_codebooks=2)
    books = (tuple(range(-15, 16, 2)), tuple(range(-16, 16, 2)))
    format = LoBcq("odd and even", layout, Codebooks(layout=layout, entries=books))
    x = torch.arange(-15.5, 16.5).view(1, 32)
    x[0, 31] = 31.0  # the scale is 1
    codewords, scales = encode(format, x)
    assert scales.item() == 1.0 and (codewords[0, :30] % 2 == 1).all()
    assert torch.equal(codewords, quantized(format, x)[0])


def test_a_token_that_is_not_finite_has_no_finite_result_and_harms_no_other():
    format, x = FORMATS["lobcq"], normal(4, 192)
    expected = quantized(format, x)
    x[0, 70], x[1, 5], x[2, 191] = math.nan, math.inf, -math.inf
    codewords, scales = encode(format, x)
    assert not scales[:3].isfinite().any()
    assert torch.equal(codewords[3], expected[0][3]) and torch.equal(scales[3], expected[1][3])
    _, stacked = fused(format, [5], 192)
    for out in (multiply(format, codewords, scales, stacked), multiply(format, x, None, stacked)):
        assert out[3].isfinite().all() and not out[:3].isfinite().any()


@pytest.mark.parametrize("tokens,sizes,columns", [(1, [1], 64), (17, [7, 130], 384)])
@pytest.mark.parametrize("format", MULTIPLIED, ids=label)
def test_w4a4_is_the_loop_bit_by_bit(format, tokens, sizes, columns):
    columns = max(columns, format.layout.array)
    wires, stacked = fused(format, sizes, columns)
    x, x_scales = quantized(format, normal(tokens, columns, seed=9) * torch.linspace(0.1, 9.0, tokens)[:, None])
    found = multiply(format, x, x_scales, stacked)
    assert torch.equal(found, loop(format, x, x_scales, wires))
    expected = torch.cat([(x * x_scales.repeat_interleave(format.layout.array, 1)) @ format.decode(wire).T for wire in wires], 1)
    assert ((found - expected).norm() / expected.norm()) < 1e-6  # the format's own order of float32 sums


def test_a_token_s_result_does_not_depend_on_the_other_tokens_where_columns_are_split():
    format, columns = FORMATS["lobcq"], 1088
    assert num_splits(9, columns // 64) == 2
    wires, stacked = fused(format, [4, 5], columns)
    x, x_scales = quantized(format, normal(65, columns, seed=9))
    many = multiply(format, x, x_scales, stacked)  # in one program
    few = multiply(format, x[3:20], x_scales[3:20], stacked)  # in one program a split
    one = multiply(format, x[3:4], x_scales[3:4], stacked)
    assert torch.equal(many[3:20], few) and torch.equal(many[3:4], one)
    assert torch.equal(few, loop(format, x[3:20], x_scales[3:20], wires))


@pytest.mark.parametrize(
    "format,dtype", [*((format, torch.bfloat16) for format in MULTIPLIED), *((MULTIPLIED[1], dtype) for dtype in FLOATS)], ids=label
)
def test_w4a16_is_the_product_of_the_decoded_weight(bfloat16, format, dtype):
    wires, stacked = fused(format, [7, 130], 256)
    x, bias = normal(5, 256, seed=9).to(dtype), normal(137, seed=10).to(dtype)
    found = multiply(format, x, None, stacked, bias, dtype)
    weight = torch.cat([format.decode(wire) for wire in wires]).double()
    expected = x.double() @ weight.T + bias.double()
    size = x.double().abs() @ weight.abs().T + bias.double().abs()
    # 256 float32 sums, two roundings of decoded scales, and one to dtype
    allowed = 260 * 2**-24 * size + torch.finfo(dtype).eps / 2 * expected.abs()
    assert found.dtype == dtype and ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_is_added_before_the_result_is_rounded(bfloat16, dtype):
    format, columns = FORMATS["lobcq"], 128
    wires, stacked = fused(format, [6], columns)
    x, x_scales = quantized(format, normal(3, columns).to(dtype))
    bias = normal(6, seed=4).to(dtype)
    expected = (loop(format, x, x_scales, wires) + bias.float()).to(dtype)
    assert torch.equal(multiply(format, x, x_scales, stacked, bias, dtype), expected)


def test_byte_permutes_find_the_entry_of_every_code():
    generator = np.random.default_rng(0)
    books = generator.integers(-127, 128, (64, 16), dtype=np.int8)
    words = np.concatenate([np.arange(1 << 16) * 0x10001, generator.integers(0, 1 << 32, 1 << 14)])
    chosen = generator.integers(0, 64, len(words))
    quarters = books.view("<u4").astype(np.int64)[chosen]
    found = run_ptx(PERMUTE.value, [words, *quarters.T])
    for place in range(8):
        byte = ((found[place // 4] >> (8 * (place % 4))) & 255).astype(np.uint8).view(np.int8)
        assert np.array_equal(byte, books[chosen, (words >> (4 * place)) & 15])


@pytest.mark.parametrize("format", [f for f in MULTIPLIED if f.layout.block == 8], ids=label)
def test_byte_permutes_and_gathers_multiply_the_same_codewords(ptx, format):
    _, stacked = fused(format, [7, 130], 256)
    x, x_scales = quantized(format, normal(5, 256, seed=9))
    found = multiply(format, x, x_scales, stacked, permute=True)
    assert torch.equal(found, multiply(format, x, x_scales, stacked, permute=False)) and found.abs().min() > 0


def test_a_compiler_is_told_the_shapes_and_types_that_come():
    """opcheck raises where the declared shapes, dtypes or schema differ from what the operation returns."""
    format = FORMATS["lobcq"]
    _, stacked = fused(format, [5], 128)
    x, table = normal(3, 128), nearest_codewords(format.codebooks.activations)
    codewords, scales = quantized(format, x)
    weights = (stacked["weight"], stacked["weight_selector"], stacked["weight_scale"], stacked["weight_global_scale"])
    rest = (codebook_bytes(format.codebooks.weights), normal(5), 8, False, torch.bfloat16)
    torch.library.opcheck(lobcq_encode, (x, table, 8, 64), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(rotated, (x, 32, torch.bfloat16), test_utils=("test_schema", "test_faketensor"))
    for inputs in ((codewords, scales), (x, None)):  # the schema's check cannot copy E4M3
        torch.library.opcheck(lobcq_matmul, (*inputs, *weights, *rest), test_utils="test_faketensor")
