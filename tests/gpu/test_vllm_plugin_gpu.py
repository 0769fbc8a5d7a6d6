"""Layers and updates on a GPU, with CUDA graphs."""

import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_DEEP_GEMM": "0",
}  # fmt: skip

import gc

import pytest
import torch
import transformers

vllm = pytest.importorskip("vllm")
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

from qurl.quantization import FORMATS  # noqa: E402
from qurl.quantization.devices import lacks  # noqa: E402
from qurl.vllm_plugin import engine_args  # noqa: E402
from qurl.vllm_plugin.axbxp import switch_precision  # noqa: E402

ALL = ["none", "int8", "fp8", "fp8_block", "mxfp4", "nvfp4", "int4", "nf4", "lobcq", "axbxp", "axbxp_k2l2"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(autouse=True)
def skip_what_this_gpu_lacks(request):
    """Formats that the GPU has no arithmetic for; without the parameter `format` the test is of Ax-BxP."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("format") or "axbxp"
    if lacking := lacks(FORMATS[name], torch.cuda.get_device_capability()):
        pytest.skip(f"{name} {lacking}")


@pytest.fixture(autouse=True)
def free_engines():
    """Two engines of a test take 0.6 of the memory: the next test's do not start beside them."""
    yield
    gc.collect()
    cleanup_dist_env_and_memory()
    torch.cuda.empty_cache()


def write_model(folder, seed):
    """A random bfloat16 Qwen2; its parameters."""
    config = transformers.Qwen2Config(**SIZES, vocab_size=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None)
    config.architectures = ["Qwen2ForCausalLM"]
    generator = torch.Generator().manual_seed(seed)
    model = transformers.Qwen2ForCausalLM(config).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.06 * noise)
    model.save_pretrained(folder)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def wire_tensors(parameters, format):
    """What the learner sends, on the GPU."""
    wire = {}
    for name, parameter in parameters.items():
        module, _, leaf = name.rpartition(".")
        encoded = FORMATS[format].encode(parameter) if name.endswith("_proj.weight") else {leaf: parameter}
        wire |= {f"{module}.{suffix}": tensor.cuda() for suffix, tensor in encoded.items()}
    return wire


def start(folder, format, precision=None):
    """An engine that captures CUDA graphs; with its model's installer."""
    llm = vllm.LLM(model=str(folder), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=256, gpu_memory_utilization=0.3,
                   generation_config="vllm", enable_prefix_caching=False, **engine_args(format, precision=precision))  # fmt: skip
    return llm, llm.collective_rpc(lambda worker: worker)[0].weight_transfer_engine.installer


def generate(llm):
    """Greedy tokens and log-probabilities."""
    prompts = [{"prompt_token_ids": [(7 * i + j) % 512 for j in range(4 + i)]} for i in range(4)]
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=16, logprobs=0, detokenize=False, ignore_eos=True)
    outputs = [request.outputs[0] for request in llm.generate(prompts, sampling, use_tqdm=False)]
    return [(list(out.token_ids), [step[token].logprob for step, token in zip(out.logprobs, out.token_ids, strict=True)])
            for out in outputs]  # fmt: skip


@pytest.mark.parametrize("format", ALL)
def test_an_update_reaches_captured_graphs_and_equals_a_fresh_engine(tmp_path, format):
    write_model(tmp_path / "old", 0)
    new = write_model(tmp_path / "new", 1)
    llm, installer = start(tmp_path / "old", format)
    before = generate(llm)
    addresses = {name: parameter.data_ptr() for name, parameter in installer.model.named_parameters()}
    for _ in range(2):
        installer.begin()
        installer.install(wire_tensors(new, format))
        installer.finish()
        assert {name: parameter.data_ptr() for name, parameter in installer.model.named_parameters()} == addresses
    after = generate(llm)
    fresh, fresh_installer = start(tmp_path / "new", format)
    assert before != after == generate(fresh)
    name = "model.layers.1.self_attn.k_proj"
    wire = FORMATS[format].encode(new[f"{name}.weight"])
    torch.testing.assert_close(fresh_installer.read_back([name])[name].cpu(), FORMATS[format].decode(wire), rtol=0, atol=0)


@pytest.mark.parametrize("format", ALL[1:])
def test_a_fused_layer_computes_what_the_format_says(tmp_path, format):
    parameters = write_model(tmp_path / "model", 0)
    _, installer = start(tmp_path / "model", format)
    x = torch.randn(5, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0)).bfloat16()
    out = installer.model.model.layers[0].mlp.gate_up_proj(x.cuda())[0].float().cpu()
    wires = [FORMATS[format].encode(parameters[f"model.layers.0.mlp.{part}_proj.weight"]) for part in ("gate", "up")]
    expected = torch.cat([FORMATS[format].linear(x.float(), wire) for wire in wires], dim=-1)
    # bfloat16 output, and activation codes at exact ties may go either way
    assert ((out - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("first", [None, "k2-w4-a4"])  # with all blocks the product multiplies the codes of the wire themselves
def test_a_precision_is_switched_in_captured_graphs_there_and_back(tmp_path, first):
    write_model(tmp_path / "model", 0)
    llm, installer = start(tmp_path / "model", "axbxp", first)
    before = generate(llm)
    tensors = {**dict(installer.model.named_parameters()), **dict(installer.model.named_buffers())}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    switch_precision(llm, "k4-w1-a2")
    after = generate(llm)
    tensors = {**dict(installer.model.named_parameters()), **dict(installer.model.named_buffers())}
    assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == addresses
    assert before != after == generate(start(tmp_path / "model", "axbxp", "k4-w1-a2")[0])
    switch_precision(llm, first or str(FORMATS["axbxp"].precision))
    assert generate(llm) == before  # the codes of the wire are those that came
    with pytest.raises(ValueError, match="CUDA graphs"):
        switch_precision(llm, "k4-w2-a2-noll")
