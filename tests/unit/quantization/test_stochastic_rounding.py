"""Codes that are right on average, and the same wherever they are drawn."""

import math

import pytest
import torch

from qurl.quantization import FORMATS, rounding_generator
from qurl.quantization.base import QuantizationFormat

NAMES = [name for name, quantization in FORMATS.items() if quantization.rounds_stochastically]
SATURATING = ["mxfp4", "nvfp4"]  # whose nearest codes are cut off under some scales, so that those must be larger here


def heavy_tailed(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) ** 3 * 0.02


def draw(name, weight, version=1, module="model.layers.0.mlp.up_proj", seed=0):
    return FORMATS[name].encode_stochastically(weight, rounding_generator(seed, version, module, weight.device))


def group_scales(name, wire):
    """What E2M1 numbers are multiplied with; [O, groups] float64."""
    if name == "mxfp4":
        return 2.0 ** (wire["weight_scale"].double() - 127.0)
    return wire["weight_scale"].double() / wire["weight_global_scale"].double()


def at_least_the_gap(name, weight):
    """No smaller than the distance of the two neighbors of each weight."""
    exact, wire = weight.double(), draw(name, weight)
    if name in SATURATING:
        scale = group_scales(name, wire)
        return 1.001 * (exact.abs() / 2).maximum(0.5 * scale.repeat_interleave(256 // scale.shape[1], dim=1))
    largest = wire["weight_scale"].double().max()
    return exact.abs() / 8 + largest * 2**-9 if name.startswith("fp8") else 1.001 * largest


@pytest.mark.parametrize("name", NAMES)
def test_decoded_weights_have_the_weight_as_their_mean(name):
    weight, count = heavy_tailed(6, 256), 400
    decoded = torch.stack([FORMATS[name].decode(draw(name, weight, version)).double() for version in range(count)])
    spread = decoded.std(dim=0)
    error = (decoded.mean(dim=0) - weight.double()).abs()
    gap = at_least_the_gap(name, weight)
    # five standard errors for each of 1536 weights, where a neighbor may never have been drawn: (1 - 12/400)^400 = 5e-6
    assert (error <= 5 * spread / math.sqrt(count) + 12 * gap / count).all()
    nearest = FORMATS[name].decode(FORMATS[name].encode(weight)).double()
    assert (nearest - weight.double()).abs().mean() > 5 * error.mean()  # what a single copy is off by, always the same way


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SATURATING])
def test_each_code_is_one_of_the_two_neighbors_and_scales_are_those_of_rounding_to_nearest(name):
    weight = heavy_tailed(140, 256)
    wire, plain = draw(name, weight), FORMATS[name].encode(weight)
    assert torch.equal(wire["weight_scale"], plain["weight_scale"]) and wire["weight"].dtype == plain["weight"].dtype
    found, nearest = (FORMATS[name].decode(w).double() for w in (wire, plain))
    exact = weight.double()
    # the other neighbor lies on the other side of the weight, where the spacing is at most twice as wide (E4M3, at a power of two)
    assert found.isfinite().all()
    same = found == nearest
    across = (found - exact).sign() != (nearest - exact).sign()
    assert (same | across).all() and 0.1 < same.double().mean() < 0.9
    gap = (found - nearest).abs()
    spacing = wire["weight_scale"].float().max() * (32 if name.startswith("fp8") else 1)
    assert (gap <= 1.001 * spacing).all()


@pytest.mark.parametrize("name", [name for name in NAMES if not FORMATS[name].matrix_tensors])  # whose scale would change
def test_numbers_that_are_codes_already_stay(name):
    wire = FORMATS[name].encode(heavy_tailed(140, 256))
    again = draw(name, FORMATS[name].decode(wire))
    decoded = FORMATS[name].decode(wire)
    # dividing a product by one of its factors may miss it by the last bit, which moves few codes
    assert (FORMATS[name].decode(again) != decoded).double().mean() < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_code_is_never_left(name):
    largest = 7.0 if name == "int4" else 6.0  # E2M1's; over a power of two these are what codes of 4 bits can be at most
    weight = torch.full((2, 256), largest / 16) * torch.tensor([[1.0], [-1.0]])
    for version in range(20):
        assert torch.equal(draw(name, weight, version)["weight"].float(), FORMATS[name].encode(weight)["weight"].float())
    assert not FORMATS[name].decode(draw(name, torch.zeros(2, 256))).any()


@pytest.mark.parametrize("name", SATURATING)
def test_scales_under_which_the_largest_of_a_group_would_be_cut_off_are_the_next_larger(name):
    weight = heavy_tailed(40, 256)
    wire, plain = draw(name, weight), FORMATS[name].encode(weight)
    found, nearest = (w["weight_scale"].view(torch.uint8).int() for w in (wire, plain))  # both ascend with the byte
    largest = weight.view(40, found.shape[1], -1).abs().amax(dim=-1).double()
    cut_off = largest > 6 * group_scales(name, plain) * (1 + 1e-6)  # the tensor's largest is 6 scales, give or take float32
    assert 0.1 < cut_off.double().mean() < 0.9
    assert torch.equal(found, nearest + cut_off.int())
    assert (largest <= 6 * group_scales(name, wire) * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", NAMES)
def test_decoded_weights_are_neighbors_of_the_weights(name):
    weight = heavy_tailed(40, 256)
    assert ((FORMATS[name].decode(draw(name, weight)).double() - weight.double()).abs() <= at_least_the_gap(name, weight)).all()


def test_seed_version_and_module_decide_the_codes_and_nothing_else():
    weight = heavy_tailed(8, 130)
    first = draw("int8", weight)["weight"]
    torch.rand(3)
    assert torch.equal(draw("int8", weight)["weight"], first)
    for change in ({"seed": 1}, {"version": 2}, {"module": "model.layers.1.mlp.up_proj"}):
        assert (draw("int8", weight, **change)["weight"] != first).double().mean() > 0.1


def test_a_format_without_it_says_so():
    with pytest.raises(ValueError, match=r"quantization\.update_awareness=stochastic_rounding.*quantization=none"):
        draw("none", torch.ones(2, 2))
    assert not FORMATS["none"].rounds_stochastically and not QuantizationFormat.rounds_stochastically
