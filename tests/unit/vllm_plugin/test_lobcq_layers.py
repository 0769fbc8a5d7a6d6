"""LO-BCQ layers of an engine on the CPU: which kernel they get, what it computes and gives back."""

import logging
from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from qurl.quantization import FORMATS, resolved_format, split_rotation
from qurl.quantization.kernels.cpu import library
from qurl.quantization.kernels.cpu.library import KernelsUnavailable
from qurl.quantization.lobcq import Codebooks, Layout, LoBcq
from qurl.vllm_plugin import kernels
from qurl.vllm_plugin.kernels import Decoded, LayerShape, rows_of, select_kernel
from qurl.vllm_plugin.lobcq import PackedLoBcq

try:
    library.load()
except KernelsUnavailable as error:
    pytest.skip(f"no compiled kernels: {error}", allow_module_level=True)

NAMES = ("lobcq", "lobcq_int8", "lobcq_w4a16")
PARTITIONS = (60, 12, 12)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shape_of(*partitions, columns=192, device="cpu"):
    return LayerShape(partitions=partitions, columns=columns, dtype=torch.bfloat16, device=torch.device(device))


def format_named(name):
    """lobcq@16 has a rotation."""
    plain, rotation = split_rotation(name)
    return resolved_format(plain, rotation=rotation)


def rows_for(format, seed=0):
    """Wire tensors of fused matrices with global scales of their own."""
    wires = [format.encode(normal(rows, 192, seed=seed + i) * 4.0**i) for i, rows in enumerate(PARTITIONS)]
    return wires, {
        name: torch.cat([rows_of(format, name, wire[name], rows) for wire, rows in zip(wires, PARTITIONS, strict=True)])
        for name in wires[0]
    }


def loaded(format, seed=0):
    layer, kernel = nn.Module(), select_kernel(format, nn.Module(), shape_of(*PARTITIONS))
    wires, rows = rows_for(format, seed)
    kernel.load(layer, rows)
    return kernel, layer, wires


@pytest.mark.parametrize("name", [*NAMES, "lobcq@64", "lobcq_w4a16@32", "nvfp4@16"])
def test_fused_matrices_with_scales_of_their_own_equal_the_reference(name):
    format = format_named(name)
    kernel, layer, wires = loaded(format)
    assert isinstance(kernel, PackedLoBcq if isinstance(format, LoBcq) else Decoded)
    x, bias = normal(2, 3, 192, seed=7).bfloat16(), normal(84, seed=8).bfloat16()
    expected = torch.cat([format.linear(x.float(), wire) for wire in wires], dim=-1) + bias.float()
    out = kernel.apply(layer, x, bias)
    assert out.dtype == torch.bfloat16 and out.shape == (2, 3, 84)
    assert ((out.float() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-4).all()  # one rounding to bfloat16
    held = kernel.decoded(layer, format, PARTITIONS)
    assert all(torch.equal(part, format.decode(wire)) for part, wire in zip(held, wires, strict=True))


def test_a_second_load_replaces_the_weights_in_the_same_storage():
    kernel, layer, _ = loaded(FORMATS["lobcq"], seed=0)
    address = layer.weight.data_ptr()
    kernel.load(layer, rows_for(FORMATS["lobcq"], seed=5)[1])
    assert torch.equal(layer.weight, loaded(FORMATS["lobcq"], seed=5)[1].weight) and layer.weight.data_ptr() == address


def test_a_compiled_layer_is_one_node_and_computes_the_same():
    kernel, layer, _ = loaded(FORMATS["lobcq"])
    x, bias = normal(3, 192, seed=7), normal(84)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: kernel.apply(layer, x, bias), backend=keep, fullgraph=True)
    assert torch.equal(compiled(x), kernel.apply(layer, x, bias))
    assert [node.target for node in graphs[0].graph.nodes if node.op == "call_function"] == [torch.ops.qurl.lobcq_linear]
    arguments = (x, layer.weight.data, bias, 84, FORMATS["lobcq"].key)
    torch.library.opcheck(torch.ops.qurl.lobcq_linear, arguments, test_utils="test_faketensor")


def test_other_devices_and_formats_are_decoded():
    for format, shape in ((FORMATS["lobcq"], shape_of(8, device="meta")), (FORMATS["nvfp4"], shape_of(8))):
        assert isinstance(select_kernel(format, nn.Module(), shape), Decoded)


@pytest.mark.parametrize("layout", [
    Layout(), Layout(array=32, num_codebooks=1), Layout(block=4, array=32, num_codebooks=8), Layout(block=2, num_codebooks=2),
])  # fmt: skip
def test_codebooks_of_a_file_beside_the_packages_in_one_process(layout):
    even = tuple(tuple(round((31 - layout.num_codebooks + k) * (2 * c - 15) / 15) for c in range(16))
                 for k in range(layout.num_codebooks))  # fmt: skip
    own = resolved_format("lobcq", codebooks=Codebooks(layout=layout, entries=even).content)
    x, weight, outs = normal(5, 192, seed=7), normal(84, 192), []
    layers = []
    for format in (own, FORMATS["lobcq"]):  # both made before one runs
        wire, layer = format.encode(weight), nn.Module()
        kernel = select_kernel(format, layer, shape_of(84))
        assert isinstance(kernel, PackedLoBcq)
        kernel.load(layer, {name: rows_of(format, name, tensor, 84) for name, tensor in wire.items()})
        layers.append((format, kernel, layer, wire))
    for format, kernel, layer, wire in layers:
        run = partial(kernel.apply, layer)
        compiled = torch.compile(lambda x, run=run: run(x, None), backend="eager", fullgraph=True)
        outs.append(kernel.apply(layer, x, None))
        # float32 sums in another order
        torch.testing.assert_close(outs[-1], format.linear(x, wire), rtol=1e-5, atol=1e-4)
        assert torch.equal(compiled(x), outs[-1])
        assert torch.equal(kernel.decoded(layer, format, (84,))[0], format.decode(wire))
    assert not torch.allclose(outs[0], outs[1], atol=1e-2)


def test_without_a_compiler_layers_are_decoded_and_one_warning_says_why(monkeypatch, caplog):
    def unavailable(format):
        raise KernelsUnavailable("there is no C++ compiler; install g++ or set CXX")

    monkeypatch.setattr("qurl.vllm_plugin.lobcq.kernel_of", unavailable)
    monkeypatch.setattr(kernels, "_announced", set())
    monkeypatch.setattr(logging.getLogger("qurl"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        chosen = [select_kernel(FORMATS["lobcq"], nn.Module(), shape_of(8)) for _ in range(3)]
    assert all(isinstance(kernel, Decoded) for kernel in chosen)
    assert [record.getMessage() for record in caplog.records] == [
        "lobcq is emulated on this device (there is no C++ compiler; install g++ or set CXX): exact codes and scales, float32 "
        "products, slow"
    ]
