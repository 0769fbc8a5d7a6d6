"""Ax-BxP: codes and products against loops over single blocks, the errors of settings, packing, how settings are written."""

import math
import random
from itertools import product

import pytest
import torch

from qurl.quantization import FORMATS, select_targets
from qurl.quantization.axbxp import (
    ALL_BLOCKS,
    AxBxP,
    Digits,
    Kept,
    PackedAxBxP,
    Precision,
    all_precisions,
    check_precision,
    parse,
    with_precision,
)
from qurl.quantization.axbxp.blocks import activation_table, keep, lower_parts, weight_table
from qurl.quantization.axbxp.precision import GROUPS

SETTINGS = [
    "k1-w3g16-a7", "k1-w4g1-a2", "k2-w2g16-a3g1", "k2-w2-a2-truncated", "k2-w3g8-a2g16-truncated", "k2-w2g1-a1g1-balanced",
    "k3-w1g4-a2", "k3-w2-a1g1-balanced", "k4-w1-a2", "k4-w1-a1-balanced", "k4-w1g32-a1g1-truncated", "k2-w4-a4",
]  # fmt: skip
NOLL = ["k4-w2-a2-noll", "k4-w2-a2-truncated-noll", "k4-w2-a2-balanced-noll"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def any_codes(*shape, seed=0):
    """Of all sizes: each with a width of its own."""
    generator = torch.Generator().manual_seed(seed)
    width = 2 ** torch.randint(0, 8, shape, generator=generator)
    return (width * (2 * torch.rand(shape, generator=generator) - 1)).round().clamp(-127, 127).to(torch.int8)


def blocks_of(code, precision):
    """The blocks of one code, low first: of the magnitude, each with the sign, or balanced digits, the last with what is left."""
    count, base = math.ceil(7 / precision.block_bits), 2**precision.block_bits
    if precision.digits is not Digits.balanced:
        sign = -1 if code < 0 else 1
        return [sign * (abs(code) // base**i % base) for i in range(count)]
    digits, rest = [], code
    for _ in range(count - 1):
        digit = rest % base
        digit -= base if digit >= base // 2 else 0
        digits.append(digit)
        rest = (rest - digit) // base
    return [*digits, rest]


def kept_slowly(row, kept, precision):
    """A row of codes, block by block."""
    base, count = 2**precision.block_bits, math.ceil(7 / precision.block_bits)
    all_blocks = [blocks_of(code, precision) for code in row]
    found = []
    for i, (code, blocks) in enumerate(zip(row, all_blocks, strict=True)):
        lowest = count - kept.blocks
        if kept.group is not None:
            peers = all_blocks[i // kept.group * kept.group :][: kept.group]
            top = max((j for other in peers for j in range(count) if other[j]), default=0)
            lowest = max(top - kept.blocks + 1, 0)
        unit = base**lowest
        value = sum(block * base**j for j, block in enumerate(blocks) if j >= lowest)
        largest = 127 // unit * unit
        if precision.digits is Digits.rounded:
            value = round(code / unit) * unit
            if kept.group not in (None, 1):
                largest = min(largest, (base**kept.blocks - 1) * unit)
        found.append(max(-largest, min(largest, value)))
    return found


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("columns", [1, 37, 64])
def test_what_is_kept_of_a_code_equals_a_loop_over_its_blocks(setting, columns):
    precision, codes = parse(setting), any_codes(4, columns)
    for kept, table in ((precision.weight, weight_table(precision)), (precision.activation, activation_table(precision))):
        assert keep(codes, table).tolist() == [kept_slowly(row, kept, precision) for row in codes.tolist()]


@pytest.mark.parametrize("precision", all_precisions(activation_groups=(1,), weight_groups=(None,)), ids=str)
def test_all_codes_by_themselves_equal_the_loop(precision):
    codes = torch.arange(-127, 128, dtype=torch.int8)
    for kept, table in ((precision.weight, weight_table(precision)), (precision.activation, activation_table(precision))):
        expected = [kept_slowly([code], kept, precision)[0] for code in codes.tolist()]
        assert keep(codes, table).tolist() == expected
        assert keep(-codes, table).tolist() == [-value for value in expected]  # no bias


@pytest.mark.parametrize("setting", [*SETTINGS, *NOLL])
def test_a_product_is_the_sum_over_the_kept_pairs_of_blocks(setting):
    precision = parse(setting)
    base, low_unit = 2**precision.block_bits, 16
    x, w = any_codes(3, 48, seed=1), any_codes(5, 48, seed=2)
    format = AxBxP("axbxp", precision)
    scale = torch.ones(5, 1)
    x[:, 0] = 127  # so that its scale is 1
    found = format.linear(x.float(), {"weight": w, "weight_scale": scale})
    for t, o in product(range(3), range(5)):
        kept_x, kept_w = (
            kept_slowly(row, kept, precision)
            for row, kept in ((x[t].tolist(), precision.activation), (w[o].tolist(), precision.weight))
        )
        total = 0
        for a, b in zip(kept_x, kept_w, strict=True):
            if precision.drops_low_product:
                a_high, b_high = (upper_block(code, precision.digits) for code in (a, b))
                total += a_high * b_high + a_high * (b - b_high) + (a - a_high) * b_high
                assert abs(a - a_high) < low_unit
            else:
                pairs = product(enumerate(blocks_of(a, precision)), enumerate(blocks_of(b, precision)))
                total += sum(p * q * base ** (i + j) for (i, p), (j, q) in pairs)
        assert found[t, o] == total


def upper_block(code, digits):
    if digits is Digits.rounded:
        return round(code / 16) * 16
    return int(code / 16) * 16 if digits is Digits.truncated else (code + 8) // 16 * 16


@pytest.mark.parametrize("digits", list(Digits))
def test_the_set_without_ll_is_two_products(digits):
    a, w = any_codes(6, 40, seed=1).double(), any_codes(7, 40, seed=2).double()
    a_low, w_low = (lower_parts(codes.to(torch.int8), digits).double() for codes in (a, w))
    assert torch.equal(a @ w.T - a_low @ w_low.T, a @ (w - w_low).T + (a - a_low) @ w_low.T)
    assert bool(((a - a_low) % 16 == 0).all())


@pytest.mark.parametrize("setting", [s for s in SETTINGS if "-balanced" not in s])
def test_keeping_twice_is_keeping_once(setting):
    precision, codes = parse(setting), any_codes(8, 96)
    for table in (weight_table(precision), activation_table(precision)):
        assert torch.equal(keep(keep(codes, table), table), keep(codes, table))


NMSE = {
    "k4-w1-a1-truncated": 0.42, "k4-w1-a2-truncated": 0.062, "k4-w2-a1-truncated": 0.365, "k4-w2-a2-truncated-noll": 0.024,
    "k4-w1-a1-balanced": 0.268, "k4-w1-a2-balanced": 0.022, "k4-w2-a1-balanced": 0.25, "k4-w2-a2-balanced-noll": 0.0084,
    "k2-w3-a3-truncated": 0.089, "k2-w2-a2-truncated": 0.42, "k2-w2g1-a2g1": 0.0066, "k2-w3g1-a3g1": 0.0039,
    "k2-w2g1-a2g1-truncated": 0.0192, "k2-w3g1-a3g1-truncated": 0.0042, "k2-w2g8-a2g8": 0.018, "k2-w2g16-a2g16": 0.028,
    "k2-w2g32-a2g32": 0.04, "k2-w3g16-a3g16": 0.0053, "k2-w3g128-a3g128": 0.0107, "k1-w4g1-a4g1": 0.0057, "k1-w4g16-a4g16": 0.013,
}  # fmt: skip
"""Measured by another program on other data, whose INT8 has 0.0037."""


def test_errors_of_settings_are_those_that_others_found():
    x = normal(32, 2048)
    x[:, [77, 1500]] *= 25
    w = normal(48, 2048, seed=1)
    exact = x.double() @ w.double().T

    def nmse(format):
        return float((format.linear(x, format.encode(w)).double() - exact).square().sum() / exact.square().sum())

    assert nmse(FORMATS["int8"]) == pytest.approx(0.0037, rel=0.5)
    found = {setting: nmse(AxBxP("axbxp", parse(setting))) for setting in NMSE}
    print({setting: round(value, 4) for setting, value in found.items()})
    for setting, value in NMSE.items():
        # rounded to 16, 127 is 112 here, since INT8 has no 128; the other program had it
        assert value / 2 < found[setting] < 2 * value, (setting, found[setting])
    assert found["k2-w2g1-a2g1"] < 0.6 * found["k2-w2g1-a2g1-truncated"]  # what rounding is worth
    assert found["k2-w2g16-a2g16"] < 0.15 * found["k2-w2-a2-truncated"]  # and the dynamic choice


@pytest.mark.parametrize("name", ["axbxp_k2l2", "axbxp_k1l3"])
@pytest.mark.parametrize("rows,groups", [(1, 1), (3, 5), (7, 3), (130, 8)])
def test_packed_weights_expand_to_the_kept_codes(name, rows, groups):
    format, matrix = FORMATS[name], normal(rows, 16 * groups) * 10.0 ** normal(rows, 1, seed=1)
    assert isinstance(format, PackedAxBxP)
    plain = AxBxP("axbxp", format.precision)
    wire, codes = format.encode(matrix), plain.encode(matrix)["weight"]
    kept = keep(codes, weight_table(format.precision))
    assert torch.equal(format.codes(wire), kept) and torch.equal(format.decode(wire), plain.decode(plain.encode(matrix)))
    x = normal(3, 16 * groups, seed=2)
    assert torch.equal(format.linear(x, wire), plain.linear(x, plain.encode(matrix)))
    assert torch.equal(format.linear(x, wire), FORMATS["int8"].linear(x, {"weight": kept, "weight_scale": wire["weight_scale"]}))
    codes = any_codes(rows, 16 * groups)
    assert torch.equal(format.codes(format.pack(codes)), keep(codes, weight_table(format.precision)))


@pytest.mark.parametrize("setting", ["k1-w4g2-a7", "k3-w1g8-a3", "k4-w1g128-a2", "k2-w2g16-a4-truncated"])
def test_other_nibbles_turn_back_too(setting):
    format, codes = PackedAxBxP("any", parse(setting)), any_codes(5, 256)
    assert torch.equal(format.codes(format.pack(codes)), keep(codes, weight_table(format.precision)))


def test_a_packed_weight_is_laid_out_as_described():
    codes = torch.zeros(1, 16, dtype=torch.int8)
    codes[0, :4] = torch.tensor([100, -3, 37, -64])
    wire = FORMATS["axbxp_k2l2"].pack(codes)
    assert wire["weight_index"].tolist() == [[2]]  # 100 has its leading block at bits 6 and 7: multiples of 16
    assert wire["weight"][0, :2].tolist() == [6 | 0 << 4, 2 | 4 << 4] and wire["weight_sign"].tolist() == [[0b1000, 0]]
    wire = FORMATS["axbxp_k1l3"].pack(codes)
    assert wire["weight_index"].tolist() == [[4]] and wire["weight"][0, :2].tolist() == [6 | 0 << 4, 2 | (8 + 4) << 4]


def test_a_precision_that_fills_no_nibbles_or_drops_activations_is_not_packed():
    for setting in ("k2-w3g16-a4", "k2-w2-a4", "k2-w2g1-a4", "k2-w2g16-a4-balanced"):
        with pytest.raises(ValueError, match="k2-w2g16-a4"):
            PackedAxBxP("any", parse(setting))
    with pytest.raises(ValueError, match="are not INT8"):
        PackedAxBxP("any", parse("k2-w2g16-a3g1"))


def test_the_wire_is_int8s_whatever_the_precision():
    matrix = normal(5, 33)
    expected = FORMATS["int8"].encode(matrix)
    for setting in (*SETTINGS, *NOLL):
        wire = AxBxP("axbxp", parse(setting)).encode(matrix)
        assert wire.keys() == expected.keys() and all(torch.equal(wire[name], expected[name]) for name in wire)
    whole = AxBxP("axbxp", parse("k2-w4-a4"))
    x = normal(4, 33, seed=1)
    assert torch.equal(whole.linear(x, expected), FORMATS["int8"].linear(x, expected))


def any_precision(draw):
    """A valid one at random."""
    while True:
        bits = draw.randint(1, 4)
        count = math.ceil(7 / bits)
        weight, activation = (Kept(draw.randint(1, count), draw.choice([None, *GROUPS])) for _ in range(2))
        try:
            return Precision(block_bits=bits, weight=weight, activation=activation, digits=draw.choice(list(Digits)))
        except ValueError:
            continue


def test_a_precision_keeps_all_where_no_product_lacks_a_part_of_a_code():
    """int8's own arithmetic under other names, and nothing else."""
    found = [precision for digits in Digits for precision in all_precisions(block_bits=(2, 3, 4), digits=digits)]
    for precision in [*found, *map(parse, NOLL)]:
        codes_stay = weight_table(precision).is_identity and activation_table(precision).is_identity
        assert precision.keeps_all is (codes_stay and not precision.drops_low_product)
        assert precision.structure[0] == activation_table(precision).group
    assert ALL_BLOCKS.keeps_all and sum(precision.keeps_all for precision in found) == 9
    x, weight = normal(3, 40), normal(5, 40, seed=1)
    int8 = FORMATS["int8"]
    assert AxBxP("axbxp", ALL_BLOCKS).linear(x, int8.encode(weight)).equal(int8.linear(x, int8.encode(weight)))


def test_a_setting_is_read_as_it_is_written():
    draw = random.Random(0)
    found = {any_precision(draw) for _ in range(400)} | {
        Precision(block_bits=4, weight=Kept(2), activation=Kept(2), digits=digits, drops_low_product=True) for digits in Digits
    }
    assert len(found) > 300 and len({str(precision) for precision in found}) == len(found)
    assert all(parse(str(precision)) == precision for precision in found)


@pytest.mark.parametrize(("setting", "message"), [
    ("k2", "is no setting; use k<bits"), ("", "is no setting"), ("K2-w2-a2", "is no setting"), ("k2-w2-a2-noisy", "is no setting"),
    ("k5-w1-a1", "use k1, k2, k3 or k4"), ("k2-w5-a2", "use w1 to w4"), ("k4-w2-a0", "use a1 to a2"), ("k2-w4g16-a2", "use w4"),
    ("k2-w2g3-a2", "use one of 1, 2, 4"), ("k1-w2-a2-balanced", "use k2, k3 or k4"), ("k4-w1-a2-noll", "use k4-w2-a2-noll"),
])  # fmt: skip
def test_what_is_no_setting_is_told_what_would_be(setting, message):
    with pytest.raises(ValueError, match=f"quantization.precision='?{setting}.*{message}"):
        parse(setting)


LAYERS = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")]


def test_the_first_pattern_that_matches_a_layer_decides():
    format = with_precision(FORMATS["axbxp"], {"layers.1.mlp.down_proj": "k4-w1-a2", "re:.*down_proj": "k2-w4-a4"}, LAYERS)
    found = {name: str(format.of_layer(name).precision) for name in LAYERS}
    assert found == dict(zip(LAYERS, ["k2-w2g16-a3g1", "k2-w4-a4", "k2-w2g16-a3g1", "k4-w1-a2"], strict=True))
    whole = with_precision(FORMATS["axbxp"], "k4-w1-a1", LAYERS)
    assert {str(whole.of_layer(name).precision) for name in LAYERS} == {"k4-w1-a1"}
    for name in ("int8", "axbxp"):
        assert with_precision(FORMATS[name], None, LAYERS) is FORMATS[name]
    assert select_targets(LAYERS, ["down_proj"])  # the patterns are those of quantization.ignore


def test_a_precision_that_cannot_be_meant_is_refused_with_its_key():
    for name in ("int8", "none", "axbxp_k2l2"):
        with pytest.raises(ValueError, match=f"quantization.precision needs quantization=axbxp, and {name}"):
            check_precision(FORMATS[name], "k2-w2-a2")
    for precision, message in ({"up_proj": "k2-w2-a2"}, "matches none"), ({"re:(": "k2-w2-a2"}, "no valid regular expression"):
        with pytest.raises(ValueError, match=f"quantization.precision=.*{message}"):
            with_precision(FORMATS["axbxp"], precision, LAYERS)
    for precision in ({}, 3, {"down_proj": 3}, "k9"):
        with pytest.raises(ValueError, match="quantization.precision="):
            check_precision(FORMATS["axbxp"], precision)
