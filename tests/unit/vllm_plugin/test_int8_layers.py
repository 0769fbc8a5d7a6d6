"""INT8 and packed Ax-BxP layers of an engine on a CPU without VNNI: which kernel they get, and what a compiler sees of them."""

import logging

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from qurl.quantization import FORMATS
from qurl.quantization.kernels.cpu import library
from qurl.quantization.kernels.cpu.library import KernelsUnavailable
from qurl.vllm_plugin import compat, kernels
from qurl.vllm_plugin.axbxp import AxBxPKernel, ExpandedAxBxP
from qurl.vllm_plugin.int8 import CompiledInt8
from qurl.vllm_plugin.kernels import FloatingInt8, LayerShape, select_kernel

try:
    library.load()
except KernelsUnavailable as error:
    pytest.skip(f"no compiled kernels: {error}", allow_module_level=True)

NAMES = ("int8", "axbxp_k2l2", "axbxp_k1l3")


@pytest.fixture(autouse=True)
def without_vnni(monkeypatch):
    monkeypatch.setattr(compat, "onednn_int8_is_exact", lambda: False)
    monkeypatch.setattr(compat, "amx_int8_usable", lambda *shape: False)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chosen(name, dtype=torch.bfloat16, device="cpu"):
    shape = LayerShape(partitions=(20,), columns=96, dtype=dtype, device=torch.device(device))
    return select_kernel(FORMATS[name], nn.Module(), shape)


def loaded(name):
    kernel, layer, wire = chosen(name), nn.Module(), FORMATS[name].encode(normal(20, 96))
    kernel.load(layer, wire)
    return kernel, layer, wire


@pytest.mark.parametrize("name", NAMES)
def test_activations_get_the_codes_that_vllm_gives_them(name):
    kernel, layer, _ = loaded(name)
    x, bias = 5.0 * normal(2, 3, 96, seed=1), normal(20).bfloat16()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        flat = x.to(dtype).view(6, 96)
        expected = kernel.multiply(layer, *compat.int8_quantize(flat), bias.to(dtype), dtype)
        assert torch.equal(kernel.apply(layer, x.to(dtype), bias.to(dtype)), expected.view(2, 3, 20))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_load_replaces_the_weights_in_the_same_storage(name):
    kernel, layer, _ = loaded(name)
    other = FORMATS[name].encode(normal(20, 96, seed=5))
    addresses = kernel.packed.data_ptr(), kernel.scale.data_ptr()
    kernel.load(layer, other)
    assert (kernel.packed.data_ptr(), kernel.scale.data_ptr()) == addresses
    assert torch.equal(kernel.decoded(layer, FORMATS[name], (20,))[0], FORMATS[name].decode(other))


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_layer_is_one_node_and_computes_the_same(name):
    kernel, layer, _ = loaded(name)
    x, bias, graphs = normal(3, 96, seed=7), normal(20), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: kernel.apply(layer, x, bias), backend=keep, fullgraph=True)
    assert torch.equal(compiled(x), kernel.apply(layer, x, bias))
    assert [node.target for node in graphs[0].graph.nodes if node.op == "call_function"] == [torch.ops.qurl.int8_linear]
    weights = (kernel.packed, kernel.scale, bias)
    torch.library.opcheck(torch.ops.qurl.int8_linear, (x, *weights, name), test_utils="test_faketensor")
    codes, scale = compat.int8_quantize(x)
    product = torch.compile(lambda codes: kernel.multiply(layer, codes, scale, bias, x.dtype), backend="eager", fullgraph=True)
    assert torch.equal(product(codes), kernel.apply(layer, x, bias))
    torch.library.opcheck(torch.ops.qurl.int8_product, (codes, scale, *weights, x.dtype, name), test_utils="test_faketensor")


def test_all_of_int8_s_family_runs_compiled_where_onednn_is_wrong():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert all(isinstance(chosen(name, dtype), CompiledInt8) for name in NAMES)
        axbxp = chosen("axbxp", dtype)
        assert isinstance(axbxp, AxBxPKernel) and isinstance(axbxp.product, CompiledInt8)


def test_without_a_compiler_codes_are_expanded_and_multiplied_as_floats_and_one_warning_each_says_why(monkeypatch, caplog):
    def unavailable(format):
        raise KernelsUnavailable("there is no C++ compiler; install g++ or set CXX")

    monkeypatch.setattr("qurl.vllm_plugin.int8.kernel_of", unavailable)
    monkeypatch.setattr(kernels, "_announced", set())
    monkeypatch.setattr(logging.getLogger("qurl"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        found = [chosen(name) for name in NAMES * 2]
    assert all(isinstance(kernel, FloatingInt8 if i % 3 == 0 else ExpandedAxBxP) for i, kernel in enumerate(found))
    assert isinstance(found[1].kernel, FloatingInt8)
    reason = "(there is no C++ compiler; install g++ or set CXX)"
    assert [record.getMessage() for record in caplog.records] == [
        f"INT8 codes are multiplied in floating point: this CPU has no VNNI, without which oneDNN is wrong {reason}",
        f"axbxp_k2l2 is expanded to INT8 when it is loaded {reason}",
        f"axbxp_k1l3 is expanded to INT8 when it is loaded {reason}",
    ]
