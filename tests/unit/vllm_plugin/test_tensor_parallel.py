"""vLLM's own layers on ranks that are threads: what they hold together is what the format makes of whole matrices."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from qurl.quantization import FORMATS, resolved_format
from qurl.quantization.lobcq import Codebooks, Layout
from qurl.quantization.rotation import split_rotation, with_rotation
from qurl.vllm_plugin.config import QurlConfig

HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, HIDDEN, INTERMEDIATE = 32, 4, 2, 128, 256
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHAPES = {
    "q_proj": (128, 128), "k_proj": (64, 128), "v_proj": (64, 128), "o_proj": (128, 128),
    "gate_proj": (256, 128), "up_proj": (256, 128), "down_proj": (128, 256),
}  # fmt: skip
DIVISIBLE = [name for name, format in FORMATS.items() if name != "none" and max(format.part) <= 64]


class ThreadGroup:
    """A tensor-parallel group as far as layers use it. Each rank is a thread."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.tensors = [None] * world_size
        self.thread = threading.local()

    @property
    def rank_in_group(self):
        return getattr(self.thread, "rank", 0)

    def all_gather(self, tensor, dim):
        self.tensors[self.rank_in_group] = tensor
        self.barrier.wait()
        gathered = torch.cat(self.tensors, dim=dim)
        self.barrier.wait()
        return gathered


@pytest.fixture
def on_ranks(monkeypatch):
    """Call a function on so many ranks; their results in order. An error of one is raised."""

    def run(world_size, function):
        group = ThreadGroup(world_size)
        monkeypatch.setattr(parallel_state, "_TP", group)

        def on_rank(rank):
            group.thread.rank = rank
            try:
                with torch.no_grad():
                    return function()
            except BaseException:
                group.barrier.abort()
                raise

        with set_current_vllm_config(VllmConfig()), ThreadPoolExecutor(world_size) as pool:
            return list(pool.map(on_rank, range(world_size)))

    return run


def make_weights(seed):
    """bfloat16, with the largest number of each in the first rank's columns and the last one's rows."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for index, weight in enumerate(weights.values()):
        weight[-1, 0] = 7.0 + index
    return {name: weight.bfloat16() for name, weight in weights.items()}


def wire_of(weights, format):
    return {name: format.encode(weight) for name, weight in weights.items()}


def make_layers(format, encoded=False, ignore=()):
    """One rank's layers of a decoder layer, staged."""
    config = QurlConfig(format, list(ignore), encoded)
    config.packed_modules_mapping = FUSED
    arguments = {"bias": False, "quant_config": config, "params_dtype": torch.bfloat16}
    return {
        "qkv_proj": QKVParallelLinear(HIDDEN, HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, prefix="qkv_proj", **arguments),
        "o_proj": RowParallelLinear(NUM_HEADS * HEAD_SIZE, HIDDEN, prefix="o_proj", **arguments),
        "gate_up_proj": MergedColumnParallelLinear(HIDDEN, [INTERMEDIATE] * 2, prefix="gate_up_proj", **arguments),
        "down_proj": RowParallelLinear(INTERMEDIATE, HIDDEN, prefix="down_proj", **arguments),
    }


def load(layers, tensors):
    """Hugging Face module -> suffix -> tensor, through the layers' loaders, then make the layers live."""
    for fused, layer in layers.items():
        shards = {"qkv_proj": ("q", "k", "v"), "gate_up_proj": (0, 1)}.get(fused, (None,))
        for name, shard in zip(FUSED.get(fused, [fused]), shards, strict=True):
            for suffix, tensor in tensors[name].items():
                parameter = getattr(layer, suffix)
                parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
        layer.quant_method.process_weights_after_loading(layer)


def held(layers):
    """Hugging Face module -> what the ranks multiply with."""
    found = {}
    for fused, layer in layers.items():
        found |= dict(zip(FUSED.get(fused, [fused]), layer.quant_method.read_back(layer), strict=True))
    return found


def assert_equal_on_every_rank(found, wires, format):
    for rank in found:
        assert rank.keys() == wires.keys()
        for name, weight in rank.items():
            assert torch.equal(weight, format.decode(wires[name])), name


def own_lobcq(num_codebooks):
    """Arrays of 32, whose selectors are a byte with four books and half of one with two."""
    layout = Layout(array=32, num_codebooks=num_codebooks)
    books = tuple(tuple(range(-24 - step, 8 - step, 2)) for step in range(num_codebooks))
    return resolved_format("lobcq", codebooks=Codebooks(layout=layout, entries=books).content)


# four ranks share two heads of keys and values
@pytest.mark.parametrize("name,world_size", [*((name, 2) for name in DIVISIBLE), ("nvfp4@32", 4), ("own_lobcq", 4)])
def test_ranks_hold_the_codes_and_scales_of_whole_matrices_wherever_they_come_from(on_ranks, name, world_size):
    plain, rotation = split_rotation(name)
    format = own_lobcq(4) if name == "own_lobcq" else with_rotation(FORMATS[plain], rotation)
    old, new = make_weights(0), make_weights(1)
    old_wires, new_wires = wire_of(old, format), wire_of(new, format)

    def encode_while_loading_then_update():
        layers = make_layers(format)
        load(layers, {name: {"weight": weight} for name, weight in old.items()})
        before = held(layers)
        for layer in layers.values():
            layer.quant_method.stage(layer)
        load(layers, new_wires)
        return before, held(layers)

    def load_encoded():
        layers = make_layers(format, encoded=True)
        load(layers, new_wires)
        return held(layers)

    before, after = zip(*on_ranks(world_size, encode_while_loading_then_update), strict=True)
    assert_equal_on_every_rank(before, old_wires, format)
    assert_equal_on_every_rank(after, new_wires, format)
    assert_equal_on_every_rank(on_ranks(world_size, load_encoded), new_wires, format)


def test_unquantized_layers_are_read_back_whole(on_ranks):
    weights = make_weights(0)

    def load_and_read():
        layers = make_layers(FORMATS["none"])
        load(layers, {name: {"weight": weight} for name, weight in weights.items()})
        return held(layers)

    for rank in on_ranks(4, load_and_read):
        assert all(torch.equal(rank[name], weight.float()) for name, weight in weights.items())


@pytest.mark.parametrize(
    "format,message",
    [
        (FORMATS["lobcq"], r"tensor_parallel_size=4 cuts o_proj into parts: .*lobcq needs a multiple of 64 columns .*\(L_A\)"),
        (with_rotation(FORMATS["nvfp4"], 64), "nvfp4 needs a multiple of 64 columns in each, .*lower quantization.rotation"),
        (own_lobcq(2), "lobcq needs a multiple of 64 columns in each, not 32"),
        (FORMATS["axbxp_k2l2"], "axbxp_k2l2 needs a multiple of 64 columns in each, not 32"),  # two bits for 16 columns
        (FORMATS["fp8_block"], "cuts q_proj, k_proj, v_proj into parts: .* needs a multiple of 128 rows in each, not 32"),
    ],
)
def test_what_would_cut_a_block_or_a_byte_is_refused_before_weights_are_read(on_ranks, format, message):
    with pytest.raises(ValueError, match=message):
        on_ranks(4, lambda: make_layers(format))
    on_ranks(4, lambda: make_layers(format, ignore=list(SHAPES)))
