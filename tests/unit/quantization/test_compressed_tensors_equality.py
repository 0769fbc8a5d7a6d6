"""Codes and configurations agree with the compressed-tensors library."""

import pytest
import torch

from qurl.quantization import FORMATS, resolved_format
from qurl.quantization.two_level import SMALLEST_E4M3, e4m3_scales

compressed_tensors = pytest.importorskip("compressed_tensors.quantization")

from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam  # noqa: E402

EIGHT_BITS = ["int8", "fp8", "fp8_block"]
WITH_SCHEME = [name for name, quantization in FORMATS.items() if quantization.scheme is not None]


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize("shape", [(64, 96), (128, 256), (200, 300), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_equal_those_of_compressed_tensors_for_the_same_scales(name, shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0] = 0.0
    wire = FORMATS[name].encode(weight)
    config = FORMATS[name].compressed_tensors_config([])
    args = compressed_tensors.QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
    scale = wire["weight_scale"]
    theirs = compressed_tensors.quantize(weight, scale, torch.zeros_like(scale), args, dtype=wire["weight"].dtype)
    assert torch.equal(theirs.float(), wire["weight"].float())


@pytest.mark.parametrize("name", WITH_SCHEME)
def test_the_checkpoint_configuration_is_one_the_library_accepts(name):
    config = FORMATS[name].compressed_tensors_config(["lm_head", "model.layers.0.mlp.down_proj"])
    parsed = compressed_tensors.QuantizationConfig.model_validate(config)
    (scheme,) = parsed.config_groups.values()
    assert parsed.ignore == ["lm_head", "model.layers.0.mlp.down_proj"]
    assert scheme.targets == ["Linear"] and scheme.weights.symmetric and scheme.weights.dynamic is False
    weights, activations, bits = {
        "int8": ("channel", "token", 8), "fp8": ("channel", "token", 8), "fp8_block": ("block", "group", 8),
        "mxfp4": ("group", "group", 4), "int4": ("group", None, 4),
    }[name]  # fmt: skip
    assert (scheme.weights.strategy, scheme.weights.num_bits) == (weights, bits)
    if activations is None:
        assert scheme.input_activations is None
    else:
        assert scheme.input_activations.dynamic is True
        assert (scheme.input_activations.strategy, scheme.input_activations.num_bits) == (activations, bits)


def library(format):
    """The library's compressor and scheme for our format, or its own preset where we have no checkpoint for it."""
    config = FORMATS[format].compressed_tensors_config([])
    if config is None:
        weights, name = preset_name_to_scheme(format.upper(), ["Linear"]).weights, f"{format}-pack-quantized"
    else:
        group = config["config_groups"]["group_0"]
        weights, name = QuantizationArgs(**group["weights"]), group["format"]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=name)
    return BaseCompressor.get_value_from_registry(name), scheme


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_codes_equal_those_of_compressed_tensors_for_the_same_scales(name, dtype):
    weight = torch.randn((64, 256), generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0] = 0.0
    wire = FORMATS[name].encode(weight)
    scale = wire["weight_scale"]
    state = {"weight": weight.float(), "weight_scale": 2.0 ** (scale.float() - 127.0) if name == "mxfp4" else scale.float()}
    if name == "nvfp4":
        state["weight_global_scale"] = wire["weight_global_scale"]
    compressor, scheme = library(name)
    theirs = compressor.compress(state, scheme)
    ours = FORMATS[name].checkpoint_tensors(wire)
    assert torch.equal(theirs["weight_packed"].view(torch.uint8), wire["weight"])
    for suffix in ours.keys() - {"weight", "weight_scale"}:
        assert torch.equal(theirs[suffix], ours[suffix]), suffix
    assert torch.equal(theirs["weight_scale"].float(), scale.float())
    if name != "int4":  # there the library wants more than the tensors
        decoded = compressor.decompress(theirs, scheme)["weight"].float()  # bfloat16
        assert torch.allclose(decoded, FORMATS[name].decode(wire), rtol=0 if name == "mxfp4" else 2**-7, atol=0)


@pytest.mark.parametrize("group_size", [32, 64, 96, 192])
def test_int4_with_a_group_size_equals_compressed_tensors(group_size):
    """SmolLM2 has 576 inputs, of which 128 is no divisor."""
    format = resolved_format("int4", group_size=group_size)
    wire = format.encode(torch.randn((64, 576), generator=torch.Generator().manual_seed(0)))
    weight = torch.randn((64, 576), generator=torch.Generator().manual_seed(0))
    group = format.compressed_tensors_config([])["config_groups"]["group_0"]
    assert group["weights"]["group_size"] == group_size
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**group["weights"]), format=group["format"])
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    theirs = compressor.compress({"weight": weight, "weight_scale": wire["weight_scale"].float()}, scheme)
    ours = format.checkpoint_tensors(wire)
    assert torch.equal(theirs["weight_packed"], ours["weight_packed"]) and torch.equal(theirs["weight_shape"], ours["weight_shape"])
    assert wire["weight_scale"].shape == (64, 576 // group_size)


def test_nvfp4_scales_are_those_of_the_library():
    weight = torch.randn((64, 256), generator=torch.Generator().manual_seed(0))
    wire = FORMATS["nvfp4"].encode(weight)
    _, scheme = library("nvfp4")
    global_scale = generate_gparam(weight.amin(), weight.amax())
    groups = weight.view(64, 16, 16)
    scale, _ = calculate_qparams(groups.amin(dim=-1), groups.amax(dim=-1), scheme.weights, global_scale)
    torch.testing.assert_close(wire["weight_global_scale"], global_scale.view(1), rtol=2**-23, atol=0)  # 1/amax is rounded there
    ours = e4m3_scales(groups.abs().amax(dim=-1), global_scale, 6.0, SMALLEST_E4M3)
    assert torch.equal(ours.float(), scale.float())
