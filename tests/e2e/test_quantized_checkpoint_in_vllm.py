"""vLLM serves what `qurl quantize` wrote, given nothing but the folder."""

import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip

import gc
import json
from contextlib import contextmanager

import pytest
import torch
import transformers

vllm = pytest.importorskip("vllm")

from qurl.ptq import QuantizeSettings, quantize_folder  # noqa: E402
from qurl.ptq.evaluation import load_float32, quantized_on_disk  # noqa: E402
from qurl.quantization import resolved_format, split_rotation  # noqa: E402
from qurl.quantization.lobcq import CodebookSets, LayerCodebooks, Layout  # noqa: E402
from qurl.quantization.lobcq.calibrate import make  # noqa: E402
from qurl.vllm_plugin import engine_args  # noqa: E402

pytestmark = pytest.mark.e2e
VOCABULARY = 199
PROMPTS = [[(7 * i + j * j) % VOCABULARY for j in range(12 + 4 * i)] for i in range(3)]
ARGUMENTS = {
    "skip_tokenizer_init": True, "enforce_eager": True, "kv_cache_memory_bytes": 16 << 20, "max_model_len": 64, "dtype": "float32",
    "generation_config": "vllm", "use_tqdm_on_load": False, "disable_log_stats": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A float32 Qwen2 with biases, a tied head and weights large enough to matter."""
    folder = tmp_path_factory.mktemp("model") / "source"
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.12) if parameter.ndim == 2 else parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@contextmanager
def engine(folder, **arguments):
    """It ends with the block: a later collection would end its successors' groups."""
    llm = vllm.LLM(model=str(folder), **ARGUMENTS, **arguments)
    yield llm
    del llm
    gc.collect()


def prompt_logprobs(llm):
    """Of each token of PROMPTS but the first ones."""
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
    found = [[entry[token].logprob for entry, token in zip(out.prompt_logprobs[1:], prompt[1:], strict=True)]
             for out, prompt in zip(outputs, PROMPTS, strict=True)]  # fmt: skip
    return torch.tensor([logprob for logprobs in found for logprob in logprobs])


@torch.no_grad()
def reference_logprobs(model):
    found = []
    for prompt in PROMPTS:
        logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        found.append(logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("named", ["int8", "fp8", "mxfp4", "nvfp4@64", "int4", "nf4", "lobcq@16", "axbxp", "axbxp_k1l3"])
def test_a_checkpoint_is_served_as_the_engine_that_encodes_while_it_loads_and_as_the_format_says(source, tmp_path, named):
    out = tmp_path / "out"
    name, rotation = split_rotation(named)
    report = quantize_folder(source, out, QuantizeSettings(format=name, rotation=rotation))
    reference = load_float32(source)
    full_precision = reference_logprobs(reference)
    format = resolved_format(name, rotation=rotation)
    quantized_on_disk(out, format, [matrix.module for matrix in report.matrices])(reference)
    expected = reference_logprobs(reference)
    with engine(out) as served, engine(source, **engine_args(name, rotation=rotation)) as encoding:
        found = prompt_logprobs(served)
        assert torch.equal(found, prompt_logprobs(encoding))
    gap, effect = (found - expected).abs(), (expected - full_precision).abs()
    print(named, "gap", float(gap.mean()), float(gap.max()), "effect", float(effect.mean()))
    # 1e-6 where nothing rounds the other way; a number next to a boundary may: one step of E4M3 makes 2 % of the effect
    assert float(gap.mean()) < 0.15 * float(effect.mean())


def test_a_checkpoint_with_a_layout_and_codebooks_by_layer_and_operand_is_served_by_what_its_config_holds(source, tmp_path):
    first, other = (make(Layout(block=4, array=32, num_codebooks=8), num_rows=8, seed=seed).codebooks for seed in (0, 1))
    codebooks = CodebookSets((
        ("re:.*layers.0.*", LayerCodebooks(weights=first, activations=other)),
        ("re:.*", LayerCodebooks(weights=other, activations=first)),
    )).content  # fmt: skip
    format = resolved_format("lobcq", codebooks=codebooks)
    report = quantize_folder(source, tmp_path / "out", QuantizeSettings(format="lobcq", codebooks=codebooks))
    reference = load_float32(source)
    full_precision = reference_logprobs(reference)
    quantized_on_disk(tmp_path / "out", format, [matrix.module for matrix in report.matrices])(reference)
    expected = reference_logprobs(reference)
    with (
        engine(tmp_path / "out") as served,
        engine(source, **engine_args("lobcq", codebooks=codebooks)) as encoding,
        engine(source, **engine_args("lobcq")) as packaged,
    ):
        found = prompt_logprobs(served)
        assert torch.equal(found, prompt_logprobs(encoding))
        assert not torch.equal(found, prompt_logprobs(packaged))  # beside each other in one process
        assert torch.equal(found, prompt_logprobs(served))
    gap, effect = (found - expected).abs(), (expected - full_precision).abs()
    print("own codebooks, gap", float(gap.mean()), float(gap.max()), "effect", float(effect.mean()))
    assert float(gap.mean()) < 0.15 * float(effect.mean())  # as above


@pytest.mark.parametrize(("key", "value"), [("version", 99), ("codebooks", "0" * 64)])
def test_a_checkpoint_of_another_encoding_is_refused_before_its_weights_are_read(source, tmp_path, key, value):
    quantize_folder(source, tmp_path / "out", QuantizeSettings(format="lobcq"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"][key] = value
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    for file in (tmp_path / "out").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=rf"quantization_config\.{key}=.* encoded with \w+ {key}"), engine(tmp_path / "out"):
        pass
