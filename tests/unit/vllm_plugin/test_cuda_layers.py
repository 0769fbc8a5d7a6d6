"""The kernels for GPUs, as far as they can run on CPU tensors."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from qurl.quantization import FORMATS
from qurl.quantization.axbxp import AxBxP, parse
from qurl.rollout.actor import engine_environment
from qurl.vllm_plugin import cuda
from qurl.vllm_plugin.axbxp import AxBxPKernel
from qurl.vllm_plugin.kernels import LayerShape, as_parameter, rows_of, select_kernel

SHAPE = LayerShape(partitions=(256, 64), columns=256, dtype=torch.bfloat16, device=torch.device("cpu"))


@pytest.mark.parametrize("setting", ["k2-w4-a4", "k2-w2g16-a3g1"])
def test_ax_bxp_that_is_switched_there_and_back_has_the_codes_it_had(setting, monkeypatch):
    monkeypatch.setattr(AxBxPKernel, "_new_product", lambda self: cuda.CudaCodes())
    layer, format = nn.Module(), AxBxP("axbxp", parse(setting))
    wire = format.encode(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    kernel = AxBxPKernel(format, LayerShape(partitions=(64,), columns=64, dtype=torch.bfloat16, device=torch.device("cpu")))
    kernel.load(layer, wire)
    before = kernel.read_back(layer)[0].clone()
    kernel.set_precision(layer, parse("k4-w1-a2"))
    assert not kernel.read_back(layer)[0].equal(before)
    kernel.set_precision(layer, parse(setting))
    assert kernel.read_back(layer)[0].equal(before) and kernel.codes.equal(wire["weight"])


def block_wires():
    generator = torch.Generator().manual_seed(0)
    return [FORMATS["fp8_block"].encode(torch.randn(rows, 256, generator=generator)) for rows in SHAPE.partitions]


def load_block(kernel):
    """A layer of fp8_block with this vLLM kernel, and what was sent."""
    layer, wires, format = nn.Module(), block_wires(), FORMATS["fp8_block"]
    loaded = cuda.CudaBlockwise(kernel, SHAPE)
    parts = [
        {name: rows_of(format, name, tensor, rows) for name, tensor in wire.items()}
        for wire, rows in zip(wires, SHAPE.partitions, strict=True)
    ]
    loaded.load(layer, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return loaded, layer, [format.decode(wire) for wire in wires]


class Requantizing:
    """A kernel that encodes anew under powers of two, as DeepGEMM does."""

    def process_weights_after_loading(self, layer):
        scale = layer.weight_scale_inv.data
        rounded = torch.exp2(torch.ceil(torch.log2(scale)))
        factor = (scale / rounded).repeat_interleave(128, 0)[: len(layer.weight)].repeat_interleave(128, 1)
        layer.weight = as_parameter((layer.weight.data.float() * factor).to(torch.float8_e4m3fn))
        layer.weight_scale_inv = as_parameter(rounded)


def test_read_back_of_fp8_blocks_is_what_the_kernel_holds():
    kept = SimpleNamespace(process_weights_after_loading=lambda layer: None)
    kernel, layer, sent = load_block(kept)
    assert all(map(torch.equal, kernel.decoded(layer, FORMATS["fp8_block"], SHAPE.partitions), sent))
    kernel, layer, sent = load_block(Requantizing())
    held = kernel.decoded(layer, FORMATS["fp8_block"], SHAPE.partitions)
    errors = [float((h - s).norm() / s.norm()) for h, s in zip(held, sent, strict=True)]
    assert all(0.005 < error < 0.05 for error in errors)  # a second rounding to E4M3, and not the factor of two of another scale


def test_scales_in_another_layout_are_not_read_as_if_they_were_ours():
    def relayed(layer):
        layer.weight_scale_inv = as_parameter(layer.weight_scale_inv.data.to(torch.uint8))

    kernel, layer, _ = load_block(SimpleNamespace(process_weights_after_loading=relayed))
    with pytest.raises(RuntimeError, match="VLLM_USE_DEEP_GEMM=0"):
        kernel.read_back(layer)


@pytest.mark.parametrize("kernel", [
    SimpleNamespace(use_deep_gemm_e8m0=True),
    SimpleNamespace(fallback=SimpleNamespace(use_deep_gemm_e8m0=True)),
])  # fmt: skip
def test_a_kernel_that_encodes_anew_is_refused(kernel, monkeypatch):
    monkeypatch.setattr(cuda, "init_fp8_linear_kernel", lambda **arguments: kernel)
    with pytest.raises(ValueError, match="powers of two, .* VLLM_USE_DEEP_GEMM=0"):
        cuda.select_cuda_kernel(FORMATS["fp8_block"], nn.Module(), SHAPE)


def test_engines_on_gpus_take_scales_as_they_are_sent():
    assert engine_environment(1, "cuda")["VLLM_USE_DEEP_GEMM"] == "0"


@pytest.mark.parametrize("name", ["int8", "axbxp", "axbxp_k1l3"])
def test_int8_products_are_refused_on_blackwell(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    shape = LayerShape(partitions=(64,), columns=64, dtype=torch.bfloat16, device=torch.device("cuda"))
    with pytest.raises(ValueError, match=f"quantization={name} needs INT8 products.* use quantization=fp8 .this GPU has 12.0"):
        select_kernel(FORMATS[name], nn.Module(), shape)
