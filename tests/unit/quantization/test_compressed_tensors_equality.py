"""Codes and configurations agree with the compressed-tensors library."""

import pytest
import torch

from qurl.quantization import FORMATS

compressed_tensors = pytest.importorskip("compressed_tensors.quantization")

from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402

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
    assert scheme.targets == ["Linear"] and scheme.weights.num_bits == (8 if name in EIGHT_BITS else 4) and scheme.weights.symmetric
    assert scheme.input_activations.dynamic is True and scheme.weights.dynamic is False
    assert scheme.weights.strategy == {"fp8_block": "block", "mxfp4": "group"}.get(name, "channel")
    assert scheme.input_activations.strategy == ("group" if name in ("fp8_block", "mxfp4") else "token")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_compressed_as_the_library_does_for_the_same_scales(dtype):
    weight = torch.randn((64, 96), generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0] = 0.0
    quantization = FORMATS["mxfp4"]
    wire = quantization.encode(weight)
    config = quantization.compressed_tensors_config([])["config_groups"]["group_0"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**config["weights"]), format=config["format"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    scale = 2.0 ** (wire["weight_scale"].float() - 127.0)
    theirs = compressor.compress({"weight": weight.float(), "weight_scale": scale}, scheme)
    assert torch.equal(theirs["weight_packed"], wire["weight"]) and torch.equal(theirs["weight_scale"], wire["weight_scale"])
    decoded = compressor.decompress(theirs, scheme)["weight"]  # bfloat16, which holds these numbers exactly
    assert torch.equal(decoded.float(), quantization.decode(wire))
