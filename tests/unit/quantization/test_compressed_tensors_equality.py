"""Codes and configurations agree with the compressed-tensors library."""

import pytest
import torch

from qurl.quantization import FORMATS

compressed_tensors = pytest.importorskip("compressed_tensors.quantization")

QUANTIZED = ["int8", "fp8", "fp8_block"]


@pytest.mark.parametrize("name", QUANTIZED)
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


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_checkpoint_configuration_is_one_the_library_accepts(name):
    config = FORMATS[name].compressed_tensors_config(["lm_head", "model.layers.0.mlp.down_proj"])
    parsed = compressed_tensors.QuantizationConfig.model_validate(config)
    (scheme,) = parsed.config_groups.values()
    assert parsed.ignore == ["lm_head", "model.layers.0.mlp.down_proj"]
    assert scheme.targets == ["Linear"] and scheme.weights.num_bits == 8 and scheme.weights.symmetric
    assert scheme.input_activations.dynamic is True and scheme.weights.dynamic is False
    assert scheme.weights.strategy == ("block" if name == "fp8_block" else "channel")
    assert scheme.input_activations.strategy == ("group" if name == "fp8_block" else "token")
