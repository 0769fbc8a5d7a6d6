"""LO-BCQ's kernels on a GPU against the format's arithmetic on the CPU, in CUDA graphs and compiled."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")
pytest.importorskip("triton")

from qurl.quantization import FORMATS
from qurl.quantization.kernels.triton import codebook_bytes, lobcq_encode, lobcq_matmul, nearest_codewords
from qurl.quantization.kernels.triton.matmul import num_splits
from qurl.quantization.lobcq import Codebooks, Layout
from qurl.vllm_plugin.kernels import rows_of
from qurl.vllm_plugin.lobcq_cuda import CudaLoBcq

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"
PARTITIONS, COLUMNS = (300, 7, 64), 2112
TOKENS = (1, 5, 16, 17, 64, 65, 300)  # every tile, and splits in one program or in several


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrices(format, seed=0):
    """Wire tensors of fused matrices of several magnitudes, and the same with one row per output feature, all on the CPU."""
    wires = [format.encode(normal(rows, COLUMNS, seed=seed + k) * 10.0**k) for k, rows in enumerate(PARTITIONS)]
    pairs = list(zip(wires, PARTITIONS, strict=True))
    return wires, {name: torch.cat([rows_of(format, name, wire[name], rows) for wire, rows in pairs]) for name in wires[0]}


def layer_of(name, seed=0):
    format, layer = FORMATS[name], nn.Module()
    kernel = CudaLoBcq(format)
    wires, rows = matrices(format, seed)
    kernel.load(layer, {key: tensor.to(DEVICE) for key, tensor in rows.items()})
    return kernel, layer, wires


def exact(format, x, wires):
    """W4A4, [T, O] float32, one rounding at a time: sums of arrays, scaled and added in the order of arrays and splits."""
    scales_of_one = [{name: torch.ones_like(wire[name].float()) for name in wire if "scale" in name} for wire in wires]
    weight = torch.cat([format.decode({**wire, **ones}) for wire, ones in zip(wires, scales_of_one, strict=True)])
    weight = weight.unflatten(1, (-1, 64))  # codewords
    scale = torch.cat([wire["weight_scale"].float() for wire in wires])
    global_scale = torch.cat([wire["weight_global_scale"].expand(len(wire["weight"])) for wire in wires])
    codewords, x_scale = format.quantize_activations(x)
    codewords = codewords.unflatten(1, (-1, 64))
    arrays = weight.shape[1]
    step = -(-arrays // num_splits(len(weight), arrays))
    out = torch.zeros(len(x), len(weight))
    for first in range(0, arrays, step):
        part = torch.zeros_like(out)
        for index in range(first, min(first + step, arrays)):
            sums = (codewords[:, index].double() @ weight[:, index].double().T).float()
            part = part + sums * (scale[:, index] * x_scale[:, index, None])
        out = out + part
    return out / global_scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["lobcq", "lobcq_int8"])
def test_activations_get_the_reference_s_codewords_and_scales(name, dtype):
    format = FORMATS[name]
    largest = format.layout.largest
    x = normal(300, COLUMNS, seed=3) * torch.logspace(-3, 3, 300)[:, None]
    x[1], x[2, :64] = 0.0, 0.0
    x[3] = torch.randint(-2 * largest, 2 * largest + 1, (COLUMNS,), generator=torch.Generator().manual_seed(1)) / 2.0
    x[3, ::64] = largest  # its scales are 1, so numbers halfway between codewords stay there
    x = x.to(dtype)
    expected = format.quantize_activations(x)
    codewords, scales = lobcq_encode(x.to(DEVICE), nearest_codewords(format.codebooks.activations).to(DEVICE), 8, 64)
    assert torch.equal(codewords.cpu().float(), expected[0]) and torch.equal(scales.cpu(), expected[1])


def test_the_first_of_equally_good_books_wins():
    layout = Layout(block=2, array=32, num_codebooks=2)
    odd_and_even = Codebooks(layout=layout, entries=(tuple(range(-15, 16, 2)), tuple(range(-16, 16, 2))))
    x = torch.arange(-15.5, 16.5).view(1, 32)
    x[0, 31] = 31.0  # the scale is 1
    codewords, _ = lobcq_encode(x.to(DEVICE), nearest_codewords(odd_and_even).to(DEVICE), 2, 32)
    assert (codewords[0, :30] % 2 == 1).all()


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("name", ["lobcq", "lobcq_int8"])
def test_w4a4_has_the_bits_of_the_loop_for_every_number_of_tokens(name, permute):
    format = FORMATS[name]
    wires, rows = matrices(format)
    weights = [rows[key].to(DEVICE) for key in ("weight", "weight_selector", "weight_scale", "weight_global_scale")]
    x = normal(max(TOKENS), COLUMNS, seed=9)
    expected = exact(format, x, wires)
    codewords, scales = (t.to(DEVICE) for t in format.quantize_activations(x))
    for tokens in TOKENS:
        inputs = (codewords[:tokens].to(torch.int8), scales[:tokens])
        table = codebook_bytes(format.codebooks.weights).to(DEVICE)
        found = lobcq_matmul(*inputs, *weights, table, None, 8, permute, torch.float32)
        assert torch.equal(found.cpu(), expected[:tokens]), tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_w4a16_is_the_product_of_the_decoded_weight(dtype):
    format = FORMATS["lobcq_w4a16"]
    kernel, layer, wires = layer_of("lobcq_w4a16")
    weight = torch.cat([format.decode(wire) for wire in wires]).double()
    x, bias = (normal(max(TOKENS), COLUMNS, seed=9) / 8).to(dtype), normal(sum(PARTITIONS), seed=10).to(dtype)
    expected = x.double() @ weight.T + bias.double()
    size = x.double().abs() @ weight.abs().T + bias.double().abs()
    for tokens in TOKENS:
        found = kernel.apply(layer, x[:tokens].to(DEVICE), bias.to(DEVICE)).cpu().double()
        # as many float32 sums as columns, and half a unit of dtype
        allowed = (COLUMNS + 4) * 2**-24 * size[:tokens] + torch.finfo(dtype).eps / 2 * expected[:tokens].abs()
        assert ((found - expected[:tokens]).abs() <= allowed).all(), tokens


@pytest.mark.parametrize("name", ["lobcq", "lobcq_w4a16"])
def test_a_token_that_is_not_finite_has_no_finite_result_and_harms_no_other(name):
    kernel, layer, _ = layer_of(name)
    x = normal(4, COLUMNS)
    x[0, 70], x[1, 5], x[2, -1] = math.nan, math.inf, -math.inf
    out = kernel.apply(layer, x.bfloat16().to(DEVICE), None)
    assert out[3].isfinite().all() and not out[:3].isfinite().any()


@pytest.mark.parametrize("tokens", [1, 17, 65])
@pytest.mark.parametrize("name", ["lobcq", "lobcq_int8", "lobcq_w4a16"])
def test_a_captured_graph_and_a_compiled_layer_compute_the_same_and_see_new_weights(name, tokens):
    kernel, layer, _ = layer_of(name)
    x = normal(tokens, COLUMNS, seed=2).bfloat16().to(DEVICE)
    bias = normal(sum(PARTITIONS), seed=3).bfloat16().to(DEVICE)
    before = kernel.apply(layer, x, bias)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel.apply(layer, x, bias)
    compiled = torch.compile(lambda x: kernel.apply(layer, x, bias), fullgraph=True)
    assert torch.equal(compiled(x), before)
    _, rows = matrices(FORMATS[name], seed=5)
    for key, tensor in rows.items():
        layer.get_parameter(key).data.copy_(tensor)
    graph.replay()
    after = kernel.apply(layer, x, bias)
    assert torch.equal(captured, after) and torch.equal(compiled(x), after) and not torch.equal(after, before)
