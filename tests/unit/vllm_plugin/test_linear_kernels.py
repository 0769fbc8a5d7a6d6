"""Kernels of the linear layers against the formats' own arithmetic, without an engine."""

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from qurl.quantization import FORMATS
from qurl.quantization.grouped import GroupedFormat
from qurl.quantization.kernels.cpu import library
from qurl.quantization.kernels.cpu.library import KernelsUnavailable
from qurl.vllm_plugin import compat
from qurl.vllm_plugin.int8 import CompiledInt8
from qurl.vllm_plugin.kernels import (
    AmxInt8,
    Decoded,
    Emulation,
    FloatingInt8,
    LayerShape,
    OneDnnInt8,
    rows_of,
    select_kernel,
    wire_of,
)

DTYPES = (torch.float32, torch.bfloat16)
INT8 = (OneDnnInt8, CompiledInt8, FloatingInt8)


def loaded(kernel_class, partitions, columns, dtype, *, format="int8", with_bias=True, seed=0):
    """A kernel that holds fused random matrices; with its layer, each one's wire tensors, and the rows it was loaded from."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Module()
    layer.bias = nn.Parameter(torch.randn(sum(partitions), generator=generator).to(dtype)) if with_bias else None
    wires = [FORMATS[format].encode(torch.randn(rows, columns, generator=generator)) for rows in partitions]
    shape = LayerShape(partitions=tuple(partitions), columns=columns, dtype=dtype, device=torch.device("cpu"))
    takes_format = kernel_class in (CompiledInt8, Emulation, Decoded)
    kernel = kernel_class(FORMATS[format], shape) if takes_format else kernel_class(shape)
    rows = {
        name: torch.cat([rows_of(FORMATS[format], name, wire[name], size) for wire, size in zip(wires, partitions, strict=True)])
        for name in wires[0]
    }
    kernel.load(layer, rows)
    return kernel, layer, wires, rows


def reference(format, x, wires, bias):
    """What the format says, in float32 and in the activations' dtype."""
    out = torch.cat([FORMATS[format].linear(x.float(), wire) for wire in wires], dim=-1)
    return out if bias is None else out + bias.float()


def ulp(values, dtype):
    """Distance of neighbouring numbers of a dtype at these magnitudes."""
    return values.abs().clamp(min=1e-3) * torch.finfo(dtype).eps


@pytest.mark.parametrize("kernel_class", INT8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 5, 33])
@pytest.mark.parametrize("partitions,columns", [([80], 96), ([64, 32, 32], 128), ([7, 7], 13)])
def test_int8_equals_the_reference(kernel_class, partitions, columns, num_tokens, dtype):
    skip_where_impossible(kernel_class)
    kernel, layer, wires, _ = loaded(kernel_class, partitions, columns, dtype)
    x = torch.randn(num_tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = reference("int8", x, wires, layer.bias)
    # integer sums are exact; what remains is the order of three float32 products and one rounding to dtype
    assert ((kernel.apply(layer, x, layer.bias).float() - expected).abs() <= 4 * ulp(expected, dtype) + 1e-6).all()


@pytest.mark.skipif(not compat.amx_int8_usable(64, 64, torch.bfloat16), reason="needs AMX")
@pytest.mark.parametrize("num_tokens", [1, 5, 33])
@pytest.mark.parametrize("with_bias", [True, False])
def test_amx_int8_equals_the_reference_up_to_exact_ties(num_tokens, with_bias):
    kernel, layer, wires, rows = loaded(AmxInt8, [64, 32], 128, torch.bfloat16, with_bias=with_bias)
    x = torch.randn(num_tokens, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    x_codes, x_scale = FORMATS["int8"].quantize_activations(x)
    exact = x.double() / (x.double().abs().amax(dim=1, keepdim=True) / 127)
    tied = (exact - exact.floor() - 0.5).abs() < 1e-5  # here, and only here, the kernel may choose the other code
    expected = reference("int8", x, wires, layer.bias)
    slack = (tied.double() @ rows["weight"].double().abs().T * x_scale.double() * rows["weight_scale"].double().T).float()
    out = kernel.apply(layer, x, layer.bias).float()
    assert ((out - expected).abs() <= slack + 2 * ulp(expected, torch.bfloat16)).all()


@pytest.mark.parametrize("format", ["fp8", "fp8_block"])
@pytest.mark.parametrize("partitions,columns", [([64, 32, 32], 160), ([256, 130], 300)])
def test_emulation_is_the_reference_for_each_fused_matrix(format, partitions, columns):
    kernel, layer, wires, _ = loaded(Emulation, partitions, columns, torch.bfloat16, format=format)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(kernel.apply(layer, x, layer.bias), reference(format, x, wires, layer.bias).bfloat16())


GROUPED = [name for name, quantization in FORMATS.items() if isinstance(quantization, GroupedFormat)]


@pytest.mark.parametrize("format", GROUPED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("partitions", [[64, 32, 32], [130]])
def test_a_decoded_weight_is_the_reference_for_each_fused_matrix(format, dtype, partitions):
    kernel, layer, wires, _ = loaded(Decoded, partitions, 256, dtype, format=format)
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = reference(format, x, wires, layer.bias)
    # 256 float32 products are summed in an order that depends on the rows, then rounded to dtype
    assert ((kernel.apply(layer, x, layer.bias).float() - expected).abs() <= ulp(expected, dtype) + 1e-4).all()
    held = kernel.decoded(layer, FORMATS[format], partitions)
    assert all(torch.equal(part, FORMATS[format].decode(wire)) for part, wire in zip(held, wires, strict=True))


@pytest.mark.parametrize("format", GROUPED)
def test_a_second_load_of_a_decoded_weight_replaces_it_in_the_same_storage(format):
    kernel, layer, _, _ = loaded(Decoded, [64, 7], 128, torch.bfloat16, format=format, seed=0)
    address = layer.weight.data_ptr()
    fresh, fresh_layer, _, rows = loaded(Decoded, [64, 7], 128, torch.bfloat16, format=format, seed=1)
    kernel.load(layer, rows)
    assert torch.equal(layer.weight, fresh_layer.weight) and layer.weight.data_ptr() == address


def skip_where_impossible(kernel_class, dtype=torch.bfloat16):
    """This CPU lacks what the kernel computes with."""
    if kernel_class is AmxInt8 and not compat.amx_int8_usable(64, 64, dtype):
        pytest.skip("needs AMX")
    if kernel_class is OneDnnInt8 and not compat.onednn_int8_is_exact():
        pytest.skip("needs VNNI")
    if kernel_class is CompiledInt8:
        try:
            library.load()
        except KernelsUnavailable as error:
            pytest.skip(f"no compiled kernels: {error}")


INT8_KERNELS = [(kernel, dtype) for kernel in INT8 for dtype in (torch.float32, torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("kernel_class,dtype", [*INT8_KERNELS, (AmxInt8, torch.bfloat16)])
@pytest.mark.parametrize("magnitude", [1.0, 1e-7])
def test_read_back_finds_every_code_in_a_packed_layout(kernel_class, dtype, magnitude):
    skip_where_impossible(kernel_class, dtype)
    kernel, layer, _, _ = loaded(kernel_class, [64, 32], 1056, dtype)
    wire = FORMATS["int8"].encode(magnitude * torch.randn(96, 1056, generator=torch.Generator().manual_seed(3)))
    wire["weight"][0] = 0
    kernel.load(layer, wire)
    codes, scale = kernel.read_back(layer)
    assert torch.equal(codes, wire["weight"]) and torch.equal(scale, wire["weight_scale"])


@pytest.mark.parametrize("kernel_class", [*INT8, AmxInt8])
def test_a_second_load_replaces_weights_and_bias_in_the_same_storage(kernel_class):
    skip_where_impossible(kernel_class)
    kernel, layer, _, _ = loaded(kernel_class, [64], 64, torch.bfloat16, seed=0)
    scale_address = kernel.scale.data_ptr()
    fresh, fresh_layer, _, rows = loaded(kernel_class, [64], 64, torch.bfloat16, seed=1)
    layer.bias.data.copy_(fresh_layer.bias.data)
    kernel.load(layer, rows)
    del rows  # a kernel must not depend on tensors of the caller
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(kernel.apply(layer, x, layer.bias), fresh.apply(fresh_layer, x, fresh_layer.bias))
    assert kernel.scale.data_ptr() == scale_address


def test_amx_is_chosen_only_where_its_kernel_works():
    shapes = [(80, 64, torch.bfloat16), (64, 48, torch.bfloat16), (64, 64, torch.float32), (64, 64, torch.float16)]
    for rows, columns, dtype in shapes:
        shape = LayerShape(partitions=(rows,), columns=columns, dtype=dtype, device=torch.device("cpu"))
        assert not isinstance(select_kernel(FORMATS["int8"], nn.Module(), shape), AmxInt8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [256, 257])
def test_the_kernel_that_is_chosen_computes_the_largest_codes_right(dtype, columns):
    shape = LayerShape(partitions=(64,), columns=columns, dtype=dtype, device=torch.device("cpu"))
    kernel = select_kernel(FORMATS["int8"], nn.Module(), shape)
    kernel.load(nn.Module(), {"weight": torch.full((64, columns), 127, dtype=torch.int8), "weight_scale": torch.ones(64, 1)})
    x = torch.full((3, columns), 127.0, dtype=dtype) * torch.tensor([[1.0], [-1.0], [1.0]], dtype=dtype)
    expected = x[:, :64].float() * (127 * columns)
    assert ((kernel.apply(nn.Module(), x, None).float() - expected).abs() <= ulp(expected, dtype)).all()


@pytest.mark.parametrize("kernel_class", [*INT8, AmxInt8])
def test_a_token_of_zeros_gives_the_bias(kernel_class):
    skip_where_impossible(kernel_class)
    kernel, layer, _, _ = loaded(kernel_class, [64], 64, torch.bfloat16)
    out = kernel.apply(layer, torch.zeros(2, 64, dtype=torch.bfloat16), layer.bias)
    assert torch.equal(out, layer.bias.expand(2, 64))


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "none"])
@pytest.mark.parametrize("size", [300, 128, 7])
def test_rows_turn_back_into_wire_tensors(format, size):
    wire = FORMATS[format].encode(torch.randn(size, 256, generator=torch.Generator().manual_seed(0)))
    rows = {name: rows_of(FORMATS[format], name, tensor, size) for name, tensor in wire.items()}
    assert all(len(tensor) == size for tensor in rows.values())
    found = wire_of(FORMATS[format], rows)
    assert found.keys() == wire.keys()
    for name, tensor in wire.items():
        assert found[name].shape == tensor.shape and torch.equal(found[name].float(), tensor.float())
