"""LO-BCQ: the format against a loop, its codebooks and how they are found."""

import json
import math
import shlex
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from qurl.quantization import FORMATS
from qurl.quantization.lobcq import Codebooks, Layout, LoBcq, load_codebooks
from qurl.quantization.lobcq.calibrate import main, make
from qurl.quantization.lobcq.calibration import calibrate
from qurl.quantization.lobcq.codebooks import FOLDER, book_order
from qurl.quantization.packing import pack, pack_bits, unpack, unpack_bits

VARIANTS = [
    Layout(block=8, array=64, num_codebooks=16), Layout(block=8, array=16, num_codebooks=8, codeword_bits=8),
    Layout(block=4, array=128, num_codebooks=4), Layout(block=2, array=32, num_codebooks=2, codeword_bits=8),
    Layout(block=8, array=64, num_codebooks=1),
]  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def any_codebooks(layout, seed=0):
    """Codebooks of several widths, far from optimal."""
    generator = torch.Generator().manual_seed(seed)
    width = layout.largest * (torch.arange(layout.num_codebooks) + 1) / layout.num_codebooks
    entries = (width[:, None] * (2 * torch.rand(layout.num_codebooks, 16, generator=generator) - 1)).round().sort(dim=1).values
    books = sorted((tuple(map(int, book)) for book in entries.tolist()), key=book_order)
    return Codebooks(layout=layout, entries=tuple(books))


def any_format(layout, **options):
    return LoBcq("any", layout, any_codebooks(layout), **options)


@pytest.mark.parametrize("layout", VARIANTS, ids=str)
def test_weights_equal_a_loop_over_books_and_entries(layout):
    quantization, matrix = any_format(layout), normal(3, 128) * torch.tensor([[1.0], [0.01], [30.0]])
    books = quantization.codebooks.weights.entries
    wire = quantization.encode(matrix)
    decoded = quantization.decode(wire)
    global_scale = 448 * layout.largest / float(matrix.abs().max())
    assert float(wire["weight_global_scale"]) == pytest.approx(global_scale, rel=1e-6)
    for row in range(3):
        for start in range(0, 128, layout.block):
            array = matrix[row, start // layout.array * layout.array :][: layout.array]
            scale = float(wire["weight_scale"][row, start // layout.array].float())
            exact = float(array.abs().max()) / layout.largest * global_scale
            assert abs(scale - exact) <= max(exact / 16, 2.0**-10) * 1.0001  # half a step of E4M3
            step = scale / float(wire["weight_global_scale"])
            block = [float(value) / step for value in matrix[row, start : start + layout.block]]
            errors = [sum(min((value - entry) ** 2 for entry in book) for value in block) for book in books]
            found = [float(value) / step for value in decoded[row, start : start + layout.block]]
            assert any(all(abs(value - round(value)) < 1e-3 and round(value) in book for value in found) for book in books)
            error = sum((value - round(value_found)) ** 2 for value, value_found in zip(block, found, strict=True))
            assert error == pytest.approx(min(errors), rel=1e-4, abs=1e-3)  # float32 may decide between near equals


def test_a_number_halfway_between_two_entries_gets_the_larger_and_the_first_of_equal_books_wins():
    layout = Layout(block=2, array=16, num_codebooks=2)
    book = tuple(range(-16, 16, 2))
    codebooks = Codebooks(layout=layout, entries=(book, book))
    found, codes = codebooks.nearest(torch.tensor([[1.0, -1.0], [40.0, -40.0], [0.99, math.nan]]))
    assert found.tolist() == [0, 0, 0]
    assert [[book[code] for code in row] for row in codes.tolist()[:2]] == [[2, 0], [14, -16]]
    assert book[codes[2, 0]] == 0


@pytest.mark.parametrize("layout", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_tokens_encoded_like_weights(layout, dtype):
    quantization, x, matrix = any_format(layout), normal(4, 128, seed=1).to(dtype), normal(5, 128, seed=2)
    wire = quantization.encode(matrix)
    inputs = torch.cat([quantization.decode(quantization.encode(token[None].float())) for token in x]).double()
    expected = inputs @ quantization.decode(wire).double().T + torch.arange(5.0)
    found = quantization.linear(x.view(2, 2, 128), wire, torch.arange(5.0)).view(4, 5)
    size = inputs.abs() @ quantization.decode(wire).double().abs().T + torch.arange(5.0)
    assert found.dtype == dtype
    assert ((found.double() - expected).abs() <= 130 * 2**-24 * size + torch.finfo(dtype).eps * expected.abs()).all()
    kept = any_format(layout, keeps_activations=True).linear(x, wire)
    expected = x.double() @ quantization.decode(wire).double().T
    assert ((kept.double() - expected).abs() <= 130 * 2**-24 * size + torch.finfo(dtype).eps * expected.abs()).all()


def test_bits_are_those_of_the_formula_and_of_the_bytes():
    published = {(128, 16): 4.5625, (64, 8): 4.5, (64, 16): 4.625, (32, 4): 4.5, (16, 2): 4.625, (64, 2): 4.25}
    for (array, num_codebooks), bits in published.items():
        layout = Layout(array=array, num_codebooks=num_codebooks)
        assert layout.bits_per_number() == bits
        assert layout.bits_per_number(16 * 64) == pytest.approx(bits + num_codebooks * 16 * 6 / 1024)
    for layout in VARIANTS:
        wire = any_format(layout).encode(normal(4, 256))
        stored = Fraction(8 * sum(tensor.nbytes for tensor in wire.values()), 4 * 256)
        assert float(stored) == any_format(layout).bits_per_weight((4, 256)) == layout.bits_per_number() + 32 / 1024


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [5, 16])
def test_packed_bits_turn_back(bits, count):
    values = torch.randint(2**bits, (3, count), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack_bits(values, bits)
    assert packed.shape == (3, math.ceil(count * bits / 8)) and torch.equal(unpack_bits(packed, bits, count), values)
    row = sum(int(value) << (bits * index) for index, value in enumerate(values[0]))
    assert packed[0].tolist() == list(row.to_bytes(packed.shape[1], "little"))
    if bits == 4 and count == 16:
        assert torch.equal(packed, pack(values)) and torch.equal(unpack(packed), values)


def student_t(degrees, *shape, seed=0):
    return normal(*shape, seed=seed) / (normal(degrees, *shape, seed=seed + 1).square().mean(dim=0)).sqrt()


def layers():
    """(tokens, weight) that the codebooks were not calibrated on: Gaussian, heavy-tailed, and with outlying channels."""
    spread = (0.4 * normal(1, 512, seed=7)).exp()
    outliers = torch.ones(1, 512)
    outliers[0, ::101] = 15.0
    return {
        "gaussian": (normal(64, 512, seed=1), normal(96, 512, seed=2)),
        "heavy-tailed": (student_t(5, 64, 512, seed=3), student_t(5, 96, 512, seed=5)),
        "transformer": (student_t(6, 64, 512, seed=8) * spread * outliers, normal(96, 512, seed=9) * (0.3 * normal(96, 1)).exp()),
    }


@pytest.mark.parametrize("kind", list(layers()))
def test_the_error_of_a_layer_is_well_below_nvfp4_s(kind):
    x, weight = layers()[kind]
    exact = x.double() @ weight.double().T
    noise = {}
    for name in ("mxfp4", "nvfp4", "lobcq", "lobcq_int8", "lobcq_w4a16", "axbxp", "axbxp_k2l2", "axbxp_k1l3"):
        out = FORMATS[name].linear(x, FORMATS[name].encode(weight)).double()
        noise[name] = float((out - exact).square().sum() / exact.square().sum())
    print(kind, {name: round(value, 5) for name, value in noise.items()})
    assert noise["lobcq"] <= 0.6 * noise["nvfp4"] < noise["mxfp4"]
    assert noise["lobcq_w4a16"] < noise["lobcq_int8"] < noise["lobcq"]


@pytest.mark.parametrize("layout", VARIANTS, ids=str)
def test_the_objective_never_rises_and_is_that_of_the_books(layout):
    blocks = torch.cat([normal(400, layout.block), 0.2 * normal(400, layout.block, seed=1)]) * layout.largest / 4
    found = calibrate(blocks, layout, max_rounds=12)
    assert all(after <= before * (1 + 1e-12) for before, after in zip(found.objective, found.objective[1:], strict=False))
    assert len(found.objective) > 2 and found.objective[-1] < found.objective[0]
    chosen, codes = found.codebooks.nearest(blocks)
    entries = torch.tensor(found.codebooks.entries)[chosen.long()[:, None], codes.long()]
    mean = float((entries.double() - blocks.double()).square().sum(dim=1).mean())
    assert mean == pytest.approx(found.rounded_objective, rel=2e-3)  # there numbers are on a grid
    one_book = calibrate(blocks, replace(layout, num_codebooks=1))
    assert layout.num_codebooks == 1 or found.objective[-1] < 0.8 * one_book.objective[-1]


def test_the_command_in_a_file_makes_the_file(tmp_path):
    shipped = FOLDER / Layout().file_name
    command = shlex.split(json.loads(shipped.read_text())["command"])
    assert command[:3] == ["python", "-m", "qurl.quantization.lobcq.calibrate"]
    assert main([*command[3:], "--out", str(tmp_path)]).read_bytes() == shipped.read_bytes()


def test_another_seed_makes_other_books_of_the_same_quality():
    layout = Layout(num_codebooks=4)
    first, other = (make(layout, num_rows=4, seed=seed) for seed in (0, 1))
    assert first.codebooks != other.codebooks
    assert other.rounded_objective == pytest.approx(first.rounded_objective, rel=0.15)


def test_codebooks_that_are_not_the_frozen_ones_are_refused(tmp_path):
    path = tmp_path / "books.json"
    content = json.loads((FOLDER / Layout().file_name).read_text())
    content["codebooks"][3][8] -= 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"books\.json holds LO-BCQ codebooks .*, not ea5438255a90.*restore the file"):
        load_codebooks(path)
    with pytest.raises(ValueError, match=r"int6\.json holds LO-BCQ codebooks ea5438255a90, not abc"):
        LoBcq("lobcq", Layout(), "abc").encode(normal(2, 64))
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds no LO-BCQ codebooks"):
        load_codebooks(path)
    with pytest.raises(ValueError, match="holds no LO-BCQ codebooks"):
        LoBcq("lobcq", Layout(num_codebooks=2), "abc").encode(normal(2, 64))
    for name in ("lobcq", "lobcq_int8", "lobcq_w4a16"):
        assert FORMATS[name].sets.layout == FORMATS[name].layout


def test_what_cannot_be_encoded_or_calibrated_is_refused():
    with pytest.raises(ValueError, match=r"quantization=lobcq needs a multiple of 64 input features, not 96"):
        FORMATS["lobcq"].encode(normal(2, 96))
    with pytest.raises(ValueError, match="num_codebooks=3: use one of 1, 2, 4, 8, 16"):
        Layout(num_codebooks=3)
    layout = Layout(num_codebooks=1)
    for blocks, message in (
        (torch.zeros(20, 8), "not all zero"), (torch.full((20, 8), math.nan), "finite"), (normal(20, 4), "blocks of 8"),
        (normal(9, 8), "at least 16"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            calibrate(blocks, layout)
    with pytest.raises(ValueError, match="order of their largest"):
        Codebooks(layout=Layout(num_codebooks=2), entries=(tuple(range(16)), tuple(range(-1, 15))))


@pytest.mark.parametrize("name", ["lobcq", "lobcq_int8"])
def test_zeros_are_exact_and_a_token_that_is_not_finite_does_not_come_out_finite(name):
    quantization, weight = FORMATS[name], normal(3, 128)
    weight[:, :64] = 0.0
    assert not quantization.decode(quantization.encode(weight))[:, :64].any()
    assert not quantization.decode(quantization.encode(torch.zeros(3, 64))).any()
    x = normal(3, 128)
    x[1, 3], x[2, 70] = math.nan, math.inf
    out = quantization.linear(x, quantization.encode(normal(4, 128)))
    assert out[0].isfinite().all() and not out[1:].isfinite().any()
