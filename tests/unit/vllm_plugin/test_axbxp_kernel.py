"""The kernels of Ax-BxP against the format's own arithmetic, without an engine."""

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from qurl.quantization import FORMATS
from qurl.quantization.axbxp import AxBxP, parse
from qurl.quantization.kernels.cpu import library
from qurl.quantization.kernels.cpu.library import KernelsUnavailable
from qurl.vllm_plugin.axbxp import AxBxPKernel, ExpandedAxBxP
from qurl.vllm_plugin.int8 import CompiledInt8
from qurl.vllm_plugin.kernels import LayerShape, select_kernel

SETTINGS = [
    "k2-w2g16-a3g1", "k2-w2g16-a2g16", "k4-w1-a2", "k4-w2-a1-balanced", "k1-w3g16-a4g1", "k3-w1g8-a3-truncated", "k2-w4-a4",
    "k4-w2-a2-noll", "k4-w2-a2-truncated-noll",
]  # fmt: skip
CASES = [([80], 96, torch.float32), ([64, 32, 32], 128, torch.bfloat16), ([7, 7], 13, torch.bfloat16)]


def loaded(setting, partitions, columns, dtype, seed=0):
    """A live layer with fused random matrices; with the kernel, the format and each matrix's wire tensors."""
    format = AxBxP("axbxp", parse(setting)) if setting.startswith("k") else FORMATS[setting]
    generator = torch.Generator().manual_seed(seed)
    wires = [format.encode(torch.randn(rows, columns, generator=generator)) for rows in partitions]
    layer = nn.Module()
    layer.bias = nn.Parameter(torch.randn(sum(partitions), generator=generator).to(dtype))
    shape = LayerShape(partitions=tuple(partitions), columns=columns, dtype=dtype, device=torch.device("cpu"))
    kernel = select_kernel(format, layer, shape)
    kernel.load(layer, rows_of(wires))
    return kernel, layer, format, wires


def rows_of(wires):
    return {name: torch.cat([wire[name] for wire in wires]) for name in wires[0]}


def tokens(columns, dtype, count=5):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(9)).to(dtype)


def assert_equals_the_format(found, x, format, wires, bias):
    expected = torch.cat([format.linear(x.float(), wire) for wire in wires], dim=-1)
    # sums are exact; what remains is the order of three float32 products and, of bfloat16 activations, rounding of sum and result
    eps = torch.finfo(x.dtype).eps
    allowed = eps * (expected.abs() + (expected + bias.float()).abs()) + 1e-5
    assert ((found.float() - expected - bias.float()).abs() <= allowed).all()


@pytest.mark.parametrize("setting", [*SETTINGS, "axbxp"])
@pytest.mark.parametrize("partitions,columns,dtype", CASES)
def test_a_layer_computes_what_the_format_says(setting, partitions, columns, dtype):
    kernel, layer, format, wires = loaded(setting, partitions, columns, dtype)
    x = tokens(columns, dtype)
    assert isinstance(kernel, AxBxPKernel)
    assert_equals_the_format(kernel.apply(layer, x, layer.bias), x, format, wires, layer.bias)
    assert torch.equal(kernel.apply(layer, x[None], layer.bias)[0], kernel.apply(layer, x, layer.bias))
    held = kernel.decoded(layer, format, partitions)
    assert all(torch.equal(part, format.decode(wire)) for part, wire in zip(held, wires, strict=True))


@pytest.fixture(params=["compiled", "expanded"])
def packed_kernel(request, monkeypatch):
    """The class that packed formats get, with a compiler and without."""
    if request.param == "expanded":
        def unavailable(format):
            raise KernelsUnavailable("there is no C++ compiler; install g++ or set CXX")

        monkeypatch.setattr("qurl.vllm_plugin.int8.kernel_of", unavailable)
        return ExpandedAxBxP
    try:
        library.load()
    except KernelsUnavailable as error:
        pytest.skip(f"no compiled kernels: {error}")
    return CompiledInt8


@pytest.mark.parametrize("name", ["axbxp_k2l2", "axbxp_k1l3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_format_runs_as_int8_on_what_it_expands_to(packed_kernel, name, dtype):
    partitions, columns = [33, 7], 96
    kernel, layer, format, wires = loaded(name, partitions, columns, dtype)
    x = tokens(columns, dtype)
    assert isinstance(kernel, packed_kernel)
    assert_equals_the_format(kernel.apply(layer, x, layer.bias), x, format, wires, layer.bias)
    held = kernel.decoded(layer, format, partitions)
    assert all(torch.equal(part, format.decode(wire)) for part, wire in zip(held, wires, strict=True))


@pytest.mark.parametrize("partitions,columns,dtype", CASES)
def test_a_switched_layer_equals_one_started_with_the_precision(partitions, columns, dtype):
    kernel, layer, _, _ = loaded("axbxp", partitions, columns, dtype)
    x = tokens(columns, dtype)
    for setting in [*SETTINGS, "k2-w2g16-a3g1"]:
        kernel.set_precision(layer, parse(setting))
        fresh, fresh_layer, _, _ = loaded(setting, partitions, columns, dtype)
        assert torch.equal(kernel.apply(layer, x, layer.bias), fresh.apply(fresh_layer, x, fresh_layer.bias))
        assert all(map(torch.equal, kernel.read_back(layer), fresh.read_back(fresh_layer)))


def test_a_switch_keeps_the_storage_that_graphs_read():
    kernel, layer, _, _ = loaded("axbxp", [64], 64, torch.bfloat16)
    held = [kernel.codes, kernel.scale, layer.activation_values, layer.activation_lowest]
    addresses = [tensor.data_ptr() for tensor in held]
    product = kernel.product
    multiplied = [value.data_ptr() for value in vars(product).values() if isinstance(value, torch.Tensor)]
    kernel.set_precision(layer, parse("k4-w1-a2"))
    now = [kernel.codes, kernel.scale, layer.activation_values, layer.activation_lowest]
    assert kernel.product is product and [tensor.data_ptr() for tensor in now] == addresses
    assert [value.data_ptr() for value in vars(product).values() if isinstance(value, torch.Tensor)] == multiplied


def test_new_weights_come_in_the_precision_that_was_switched_to():
    kernel, layer, _, _ = loaded("axbxp", [64, 7], 64, torch.bfloat16)
    kernel.set_precision(layer, parse("k4-w1-a2"))
    fresh, fresh_layer, _, wires = loaded("k4-w1-a2", [64, 7], 64, torch.bfloat16, seed=1)
    layer.bias.data.copy_(fresh_layer.bias.data)
    rows = rows_of(wires)
    kernel.load(layer, rows)
    rows["weight"].zero_()  # a kernel must not depend on tensors of the caller
    x = tokens(64, torch.bfloat16)
    assert torch.equal(kernel.apply(layer, x, layer.bias), fresh.apply(fresh_layer, x, fresh_layer.bias))


def test_on_a_gpu_what_graphs_were_captured_with_stays():
    format = FORMATS["axbxp"]
    kernel = AxBxPKernel(format, LayerShape(partitions=(64,), columns=64, dtype=torch.bfloat16, device=torch.device("cpu")))
    object.__setattr__(kernel.shape, "device", torch.device("cuda"))
    kernel.check_switch(parse("k4-w1-a2"))
    for setting in ("k2-w2g16-a2g16", "k4-w2-a2-noll"):
        with pytest.raises(ValueError, match=f"CUDA graphs .* quantization.precision={setting}"):
            kernel.check_switch(parse(setting))


def test_parts_of_one_matrix_must_have_one_precision():
    layers = {"m.q_proj": parse("k4-w1-a2"), "m.k_proj": parse("k4-w1-a1")}
    format = AxBxP("axbxp", parse("k2-w4-a4"), layers)
    assert format.of_layers(["m.q_proj"]).precision == layers["m.q_proj"]
    with pytest.raises(ValueError, match="m.q_proj k4-w1-a2, m.k_proj k4-w1-a1.* all the same"):
        format.of_layers(["m.q_proj", "m.k_proj"])
