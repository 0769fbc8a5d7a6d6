"""Engines of vLLM with qurl's layers: loading, updating in place, reading back. Correctness is equality with a fresh engine."""

import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip

import gc
import json
import random
from contextlib import contextmanager
from types import SimpleNamespace

import psutil
import pytest
import torch
import transformers

vllm = pytest.importorskip("vllm")

from qurl.quantization import FORMATS, export_checkpoint, resolved_format, select_targets  # noqa: E402
from qurl.quantization.lobcq import Codebooks, CodebookSets, LayerCodebooks, Layout  # noqa: E402
from qurl.sync import SyncError, WireBucket  # noqa: E402
from qurl.sync.bucket import WireTensor, describe, lay_out, pack  # noqa: E402
from qurl.vllm_plugin import engine_args, quantization_config  # noqa: E402
from qurl.vllm_plugin.compat import onednn_int8_is_exact  # noqa: E402
from qurl.vllm_plugin.transfer import install_report, read_back  # noqa: E402

pytestmark = pytest.mark.e2e
VOCABULARY = 199  # not a multiple of vLLM's padding
SMALL = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
ARGUMENTS = {
    "skip_tokenizer_init": True, "enforce_eager": True, "kv_cache_memory_bytes": 16 << 20, "max_model_len": 128,
    "generation_config": "vllm", "use_tqdm_on_load": False, "disable_log_stats": True,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cheap_garbage_collection():
    """These tests collect garbage at every turn, which takes long over all that the imports brought."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Make (once) a random model: (architecture, tied, dtype, seed) -> its folder and its parameters."""
    made = {}

    def make(architecture, tied, dtype, seed, sizes=SMALL):
        key = (architecture, tied, dtype, seed, tuple(sizes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            config = getattr(transformers, f"{architecture}Config")(
                **sizes, vocab_size=VOCABULARY, tie_word_embeddings=tied, max_position_embeddings=256,
                bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
            config.architectures = [f"{architecture}ForCausalLM"]
            generator = torch.Generator().manual_seed(seed)
            model = getattr(transformers, f"{architecture}ForCausalLM")(config).to(dtype)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
            model.save_pretrained(folder)
            made[key] = str(folder), {name: parameter.detach() for name, parameter in model.named_parameters()}
        return made[key]

    return make


def wire_tensors(parameters, format, ignore=()):
    """What the learner sends."""
    linears = [name.removesuffix(".weight") for name in parameters if "_proj.weight" in name]
    targets = frozenset() if format == "none" else select_targets(linears, ignore)
    wire = {}
    for name, parameter in parameters.items():
        module, _, leaf = name.rpartition(".")
        encoded = FORMATS[format].encode(parameter) if module in targets and leaf == "weight" else {leaf: parameter}
        wire |= {f"{module}.{suffix}": tensor for suffix, tensor in encoded.items()}
    return wire


@contextmanager
def engine(folder, dtype, **arguments):
    """An in-process engine and its worker's parts. It ends with the block: a later collection would end its successors' groups."""
    llm = vllm.LLM(model=folder, dtype=str(dtype).removeprefix("torch."), **ARGUMENTS, **arguments)
    worker = llm.collective_rpc(lambda worker: worker)[0]
    parts = SimpleNamespace(llm=llm, model=worker.model_runner.model, transfer=worker.weight_transfer_engine)
    yield parts
    vars(parts).clear()
    del llm, worker
    gc.collect()


def generate(engine):
    """Greedy tokens and their log-probabilities for prompts of several lengths."""
    prompts = [{"prompt_token_ids": [(7 * i + j * j) % VOCABULARY for j in range(3 + 4 * i)]} for i in range(5)]
    engine.llm.reset_prefix_cache()
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=12, logprobs=0, detokenize=False, ignore_eos=True)
    outputs = [request.outputs[0] for request in engine.llm.generate(prompts, sampling, use_tqdm=False)]
    return [(list(out.token_ids), [step[token].logprob for step, token in zip(out.logprobs, out.token_ids, strict=True)])
            for out in outputs]  # fmt: skip


def install(engine, wire, portion=3, seed=0):
    """A whole update in shuffled portions."""
    items = list(wire.items())
    random.Random(seed).shuffle(items)
    engine.transfer.installer.begin()
    for start in range(0, len(items), portion):
        engine.transfer.installer.install(dict(items[start : start + portion]))
    engine.transfer.installer.finish()


CASES = [
    ("Qwen2", False, torch.float32, "int8"),
    ("Qwen2", True, torch.bfloat16, "int8"),
    ("Qwen3", True, torch.bfloat16, "none"),
    ("Llama", False, torch.float32, "none"),
    ("Llama", False, torch.bfloat16, "fp8_block"),
    ("Qwen2", True, torch.bfloat16, "lobcq"),
]


@pytest.mark.parametrize("architecture,tied,dtype,format", CASES)
def test_an_updated_engine_equals_one_started_on_the_new_weights(checkpoints, architecture, tied, dtype, format):
    old, _ = checkpoints(architecture, tied, dtype, 0)
    new, parameters = checkpoints(architecture, tied, dtype, 1)
    wire = wire_tensors(parameters, format)
    with engine(old, dtype, **engine_args(format)) as updated, engine(new, dtype, **engine_args(format)) as fresh:
        before = generate(updated)
        install(updated, wire)
        after = generate(updated)
        assert after != before
        assert after == generate(fresh)  # bit-equal: same codes, same kernels
        install(updated, wire_tensors(checkpoints(architecture, tied, dtype, 0)[1], format), portion=1000, seed=1)
        assert generate(updated) == before
        for module in ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            name = f"model.layers.1.{module}"
            suffixes = FORMATS[format].encode(parameters[f"{name}.weight"])
            tensors = {suffix: wire[f"{name}.{suffix}"] for suffix in suffixes}
            held = fresh.llm.collective_rpc(read_back, args=([name],))[0][name]
            assert torch.equal(held, FORMATS[format].decode(tensors))


def layered_codebooks():
    """Of either operand, other ones for the attention of layer 0."""

    def even(least):
        entries = tuple(tuple(round((least + k) * (2 * c - 15) / 15) for c in range(16)) for k in range(16))
        return Codebooks(layout=Layout(), entries=entries)

    first = LayerCodebooks(weights=even(10), activations=even(12))
    rest = LayerCodebooks(weights=even(14), activations=even(16))
    return CodebookSets((("re:model.layers.0.self_attn", first), ("re:.*", rest))).content


@pytest.mark.parametrize(("format", "codebooks"), [("int8", None), ("fp8_block", None), ("lobcq", layered_codebooks())])
def test_fused_layers_of_the_engine_compute_what_the_format_says(checkpoints, format, codebooks):
    quantization = resolved_format(format, codebooks=codebooks)
    folder, parameters = checkpoints("Qwen2", False, torch.float32, 0)
    x = torch.randn(7, SMALL["hidden_size"], generator=torch.Generator().manual_seed(0))
    with engine(folder, torch.float32, **engine_args(format, codebooks=codebooks)) as running:
        layer = running.model.model.layers[0]
        fused_layers = ((layer.self_attn.qkv_proj, "self_attn", "qkv"), (layer.mlp.gate_up_proj, "mlp", ("gate", "up")))
        for fused, parent, parts in fused_layers:
            expected = []
            for part in parts:
                name = f"model.layers.0.{parent}.{part}_proj"
                of_layer = quantization.of_layer(name)
                wire = of_layer.encode(parameters[f"{name}.weight"])
                expected.append(of_layer.linear(x, wire, parameters.get(f"{name}.bias")))
            # float32: only the order of the last three roundings differs
            torch.testing.assert_close(fused(x)[0], torch.cat(expected, dim=-1), rtol=1e-6, atol=1e-5)


def test_an_ignored_layer_stays_in_full_precision_and_is_updated(checkpoints):
    ignore = ["re:model.layers.0.self_attn.(q|k|v)_proj", "down_proj"]
    old, new = checkpoints("Qwen2", True, torch.float32, 0), checkpoints("Qwen2", True, torch.float32, 1)
    with engine(old[0], torch.float32, **engine_args("int8", ignore)) as running:
        install(running, wire_tensors(new[1], "int8", ignore))
        for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
            assert torch.equal(running.transfer.installer.read_back([name])[name], new[1][f"{name}.weight"])
        with engine(new[0], torch.float32, **engine_args("int8", ignore)) as fresh:
            assert generate(running) == generate(fresh)


@pytest.mark.parametrize("ignore,message", [(["q_proj"], "as one matrix"), (["model.layers.7.mlp"], "matches none")])
def test_an_ignore_list_that_cannot_be_honoured_stops_the_start(checkpoints, ignore, message):
    with pytest.raises(ValueError, match=message), engine(
        checkpoints("Qwen2", True, torch.float32, 0)[0], torch.float32, **engine_args("int8", ignore)
    ):
        pass


def test_what_is_wrong_with_an_update_is_named(checkpoints):
    folder, parameters = checkpoints("Qwen2", True, torch.float32, 0)
    wire = wire_tensors(parameters, "int8")
    with engine(folder, torch.float32, **engine_args("int8")) as running:
        installer, before = running.transfer.installer, generate(running)
        some = ("layers.1.self_attn.k_proj.weight_scale", "layers.0.self_attn.v_proj.bias", "norm.weight", "embed_tokens.weight")
        for left_out in (f"model.{name}" for name in some):
            installer.begin()
            installer.install({name: tensor for name, tensor in wire.items() if name != left_out})
            with pytest.raises(RuntimeError, match="lacks 1 of .* parameters"):
                installer.finish()
        wrong = {
            "which is no parameter": {"model.layers.9.mlp.up_proj.weight": wire["model.layers.0.mlp.up_proj.weight"]},
            "came as torch.float32": {"model.layers.0.mlp.up_proj.weight": parameters["model.layers.0.mlp.up_proj.weight"]},
            "came as torch.int8": {"model.layers.0.self_attn.q_proj.bias": torch.zeros(128, dtype=torch.int8)},
            "still misses": {"model.norm.weight": torch.zeros(129)},
        }
        for message, tensors in wrong.items():
            installer.begin()
            with pytest.raises(RuntimeError, match=message):
                installer.install(tensors)
        installer.begin()
        installer.install({"model.norm.weight": wire["model.norm.weight"]})
        with pytest.raises(RuntimeError, match="twice"):
            installer.install({"model.norm.weight": wire["model.norm.weight"]})
        install(running, wire)  # and a whole update repairs everything
        assert generate(running) == before


def test_fifty_updates_do_not_grow_the_process(checkpoints):
    sizes = SMALL | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3}
    for dtype, format in ((torch.bfloat16, "int8"), (torch.float32, "int8"), (torch.bfloat16, "none")):
        folder, parameters = checkpoints("Qwen2", True, dtype, 0, sizes)
        wire = wire_tensors(parameters, format)
        model_bytes = sum(tensor.nbytes for tensor in wire.values())
        with engine(folder, dtype, **engine_args(format)) as running:
            resident = []
            for seed in range(50):
                install(running, wire, seed=seed)
                gc.collect()
                resident.append(psutil.Process().memory_info().rss)
        # one copy kept per update would be 40 models; the allocator itself wanders by a few
        assert resident[-1] - resident[9] < 8 * model_bytes, (dtype, format, model_bytes, resident[::10])


def test_the_stream_reaches_the_model_through_vllms_own_calls(checkpoints):
    old, new = checkpoints("Qwen2", True, torch.bfloat16, 0), checkpoints("Qwen2", True, torch.bfloat16, 1)
    wire, int8 = wire_tensors(new[1], "int8"), engine_args("int8")
    with engine(old[0], torch.bfloat16, **int8) as running, engine(new[0], torch.bfloat16, **int8) as fresh:

        def send(version, manifest):
            running.llm.start_weight_update()
            running.llm.update_weights({"update_info": {"version": version, "bucket": bucket_of(wire, version)}})
            running.llm.update_weights({"update_info": {"version": version, "manifest": manifest}})
            running.llm.finish_weight_update()

        manifest = [describe(name, tensor) for name, tensor in wire.items()]
        with pytest.raises(SyncError):
            send(1, manifest[1:])
        assert not running.transfer.receiver.is_ready
        with counted(running.model, "load_weights") as loads, counted(FORMATS["int8"], "encode") as encodings:
            send(2, manifest)  # a failed update does not wedge vLLM
        assert len(loads) == 1  # of the one bucket: every call walks over all modules
        assert not encodings
        assert running.transfer.receiver.version == 2
        assert running.llm.collective_rpc(install_report)[0].num_tensors == len(wire)
        assert generate(running) == generate(fresh)


@contextmanager
def counted(owner, name):
    """A list that gets an entry for every call of a method of `owner`, which the class has."""
    calls, method = [], getattr(owner, name)
    setattr(owner, name, lambda *args: (calls.append(args), method(*args))[1])
    yield calls
    delattr(owner, name)


def bucket_of(wire, version) -> WireBucket:
    """All tensors in one bucket whose bytes lie in this process."""
    tensors = [WireTensor(record=describe(name, tensor), pieces=(tensor,), delta=None) for name, tensor in wire.items()]
    header, pieces = lay_out(tensors, version=version, sender_rank=0, index=0, keep_base=False)
    buffer = torch.zeros(header.num_bytes, dtype=torch.uint8)
    pack(pieces, buffer)

    class Here:
        @contextmanager
        def open(self, links):
            yield buffer

    return WireBucket(**{field: getattr(header, field) for field in header.__slots__} | {"payload": Here()})


def test_a_checkpoint_of_wire_tensors_loads_as_encoded(checkpoints, tmp_path):
    from safetensors.torch import save_file

    folder, parameters = checkpoints("Qwen2", True, torch.bfloat16, 0)
    for format in ("fp8_block", "lobcq"):
        target = tmp_path / format
        target.mkdir()
        with open(f"{folder}/config.json") as file:
            config = json.load(file)
        config["quantization_config"] = quantization_config(format, encoded=True)
        (target / "config.json").write_text(json.dumps(config))
        tensors = {name: tensor.contiguous().clone() for name, tensor in wire_tensors(parameters, format).items()}
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        with engine(str(target), torch.bfloat16) as encoded, engine(folder, torch.bfloat16, **engine_args(format)) as fresh:
            assert generate(encoded) == generate(fresh)


@pytest.mark.skipif(not onednn_int8_is_exact(), reason="without VNNI the products of vLLM's own INT8 layers are wrong")
def test_qurls_int8_layers_equal_vllms_own_on_an_exported_checkpoint(checkpoints, tmp_path):
    folder, _ = checkpoints("Qwen2", False, torch.bfloat16, 0)
    export_checkpoint(folder, tmp_path / "int8", FORMATS["int8"])
    with engine(str(tmp_path / "int8"), torch.bfloat16) as stock, engine(folder, torch.bfloat16, **engine_args("int8")) as ours:
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            layers = [part.model.get_submodule(f"model.layers.1.{name}") for part in (stock, ours)]
            x = torch.randn(9, layers[0].input_size, generator=torch.Generator().manual_seed(0)).bfloat16()
            assert torch.equal(layers[0](x)[0], layers[1](x)[0])  # the same codes through the same vLLM kernel


def test_only_qurls_engines_have_its_norm(checkpoints, tmp_path):
    folder, _ = checkpoints("Qwen2", False, torch.bfloat16, 0)
    with engine(folder, torch.bfloat16) as stock, engine(folder, torch.bfloat16, **engine_args("none")) as ours:
        assert not stock.model.model.norm.is_fused and ours.model.model.norm.is_fused
        x, residual = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
        expected = stock.model.model.norm(x.clone(), residual.clone())
        found = ours.model.model.norm(x.clone(), residual.clone())
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[0], expected[0], rtol=2**-7, atol=0)  # one rounding against two
