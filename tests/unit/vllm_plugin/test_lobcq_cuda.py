"""The LO-BCQ layer of a GPU, with the kernels' arithmetic in torch."""

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")
pytest.importorskip("triton")

from qurl.quantization import FORMATS, resolved_format
from qurl.quantization.hadamard import rotate
from qurl.quantization.lobcq import Layout, LoBcq
from qurl.vllm_plugin import lobcq_cuda
from qurl.vllm_plugin.kernels import LayerShape, rows_of, select_kernel
from qurl.vllm_plugin.lobcq_cuda import CudaLoBcq

PARTITIONS, COLUMNS = (7, 130), 128


def loaded(name, kernel=None, layer=None, seed=0, rotation=0):
    """A kernel that holds fused matrices of different magnitudes; with its layer and each one's wire tensors."""
    format, generator = resolved_format(name, rotation=rotation), torch.Generator().manual_seed(seed)
    matrices = [torch.randn(rows, COLUMNS, generator=generator) * 10.0**k for k, rows in enumerate(PARTITIONS)]
    wires = [format.encode(matrix) for matrix in matrices]
    kernel, layer = kernel or CudaLoBcq(format), layer or nn.Module()
    kernel.load(layer, {
        key: torch.cat([rows_of(format, key, wire[key], rows) for wire, rows in zip(wires, PARTITIONS, strict=True)])
        for key in wires[0]
    })  # fmt: skip
    return kernel, layer, wires


@pytest.mark.parametrize("name", ["lobcq", "lobcq_int8", "lobcq_w4a16"])
def test_layers_on_a_gpu_get_the_kernel_and_layers_on_a_cpu_do_not(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for device, is_for_gpus in (("cuda", True), ("cpu", False)):
        shape = LayerShape(partitions=PARTITIONS, columns=COLUMNS, dtype=torch.bfloat16, device=torch.device(device))
        assert isinstance(select_kernel(FORMATS[name], nn.Module(), shape), CudaLoBcq) is is_for_gpus


def test_arrays_too_short_for_tensor_cores_are_refused():
    with pytest.raises(ValueError, match=r"format=short has arrays of 16 columns, .* give quantization.codebooks"):
        CudaLoBcq(LoBcq("short", Layout(array=16), "none"))


@pytest.mark.parametrize("name", ["lobcq", "lobcq_w4a16"])
def test_what_it_holds_is_what_came_and_a_second_load_replaces_it(name):
    kernel, layer, _ = loaded(name)
    tables = (layer.codebooks, layer.nearest_codewords)
    _, _, wires = loaded(name, kernel, layer, seed=1)
    held = kernel.decoded(layer, FORMATS[name], PARTITIONS)
    assert all(torch.equal(part, FORMATS[name].decode(wire)) for part, wire in zip(held, wires, strict=True))
    assert tables[0] is layer.codebooks and tables[1] is layer.nearest_codewords
    assert {key for key, _ in layer.named_parameters()} == set(wires[0])


@pytest.mark.parametrize("rotation", [0, 32])
@pytest.mark.parametrize("name", ["lobcq", "lobcq_int8", "lobcq_w4a16"])
def test_a_layer_hands_the_kernels_what_they_ask_for(monkeypatch, name, rotation):
    format, plain = resolved_format(name, rotation=rotation), FORMATS[name]

    def encode(x, nearest, block, array):
        assert nearest is layer.nearest_codewords and (block, array) == (8, 64)
        codewords, scales = plain.quantize_activations(x)
        return codewords.to(torch.int8), scales

    def matmul(x, x_scales, weight, selectors, scales, global_scale, codebooks, bias, block, permute, dtype):
        assert (x.dtype == torch.int8) == (x_scales is not None) and codebooks is layer.codebooks and block == 8 and permute
        numbers = x.float() if x_scales is None else x * x_scales.repeat_interleave(64, dim=1)
        wire = {"weight": weight, "weight_selector": selectors, "weight_scale": scales, "weight_global_scale": global_scale}
        return (numbers @ plain.decode(wire).T + bias.float()).to(dtype)

    kernel, layer, wires = loaded(name, rotation=rotation)
    monkeypatch.setattr(lobcq_cuda, "rotated", lambda x, size, dtype: rotate(x.float(), size).to(dtype))
    monkeypatch.setattr(lobcq_cuda, "lobcq_encode", encode)
    monkeypatch.setattr(lobcq_cuda, "lobcq_matmul", matmul)
    generator = torch.Generator().manual_seed(2)
    x, bias = torch.randn(2, 3, COLUMNS, generator=generator).bfloat16(), torch.randn(137, generator=generator).bfloat16()
    expected = (torch.cat([format.linear(x.float(), wire) for wire in wires], dim=-1) + bias.float()).bfloat16()
    # one unit of bfloat16, and of each rotated activation that the format keeps in it
    atol = 2**-9 * float(expected.abs().max()) if rotation and format.keeps_activations else 1e-4
    torch.testing.assert_close(kernel.apply(layer, x, bias), expected, rtol=2**-7, atol=atol)


def test_a_compiler_sees_operators_and_no_break():
    kernel, layer, _ = loaded("lobcq")
    layer.to("meta")
    x = torch.empty(2, 3, COLUMNS, dtype=torch.bfloat16, device="meta")
    found = torch.compile(lambda x: kernel.apply(layer, x, None) * 2, backend="eager", fullgraph=True)(x)
    assert found.shape == (2, 3, 137) and found.dtype == torch.bfloat16
