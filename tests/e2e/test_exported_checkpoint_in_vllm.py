"""Plain vLLM, without this project's plugin, loads exported folders and computes with their weights."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers

from qurl.quantization import FORMATS, export_checkpoint

NEEDS_AMX = pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vLLM's CPU kernel for FP8 blocks needs AMX")
PROMPT = [5, 17, 3, 88, 41, 9, 60, 2, 77, 30, 54, 11]

# vLLM changes the process it runs in (threads, seeds, environment), hence a process of its own.
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16", max_model_len=64, max_num_seqs=4,
          disable_log_stats=True)
prompt = json.loads(sys.argv[2])
params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
(out,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
print("LOGPROBS" + json.dumps([entry[token].logprob for entry, token in zip(out.prompt_logprobs[1:], prompt[1:])]))
"""


def random_decoder(family: str):
    """A decoder whose matrices fill whole 128x128 blocks, so that every format loads, with weights large enough to matter."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
        max_position_embeddings=64, tie_word_embeddings=False,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).bfloat16().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.08) if parameter.ndim == 2 else parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def prompt_logprobs(model) -> torch.Tensor:
    """Logprob of each token of PROMPT but the first, float32."""
    with torch.no_grad():
        logprobs = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


def vllm_prompt_logprobs(folder) -> torch.Tensor:
    """The same from vLLM."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_PLUGINS": "",
                "GOMP_SPINCOUNT": "1000", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    result = subprocess.run([sys.executable, "-c", SCRIPT, str(folder), json.dumps(PROMPT)], env={**os.environ, **settings},
                            capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return torch.tensor(json.loads(result.stdout.partition("LOGPROBS")[2].splitlines()[0]))


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "family"),
    # vLLM's CPU kernel for FP8 blocks takes no bfloat16 bias, and Qwen2 has biases
    [("int8", "Qwen2"), ("fp8", "Qwen2"), pytest.param("fp8_block", "Llama", marks=NEEDS_AMX)],
)
def test_vllm_loads_an_exported_checkpoint_and_agrees_with_its_decoded_weights(tmp_path, name, family):
    model = random_decoder(family)
    targets = export_checkpoint(model, tmp_path / "out", FORMATS[name])
    decoded = copy.deepcopy(model).float()
    with torch.no_grad():
        for target in targets:
            weight = decoded.get_parameter(f"{target}.weight")
            weight.copy_(FORMATS[name].decode(FORMATS[name].encode(model.get_parameter(f"{target}.weight"))))
    expected = prompt_logprobs(decoded)
    assert float(expected.std()) > 0.5  # a loader that mixed up scales could not come near by chance
    gap = (vllm_prompt_logprobs(tmp_path / "out") - expected).abs()
    print(name, "mean", float(gap.mean()), "max", float(gap.max()), "std of logprobs", float(expected.std()))
    # quantized activations: INT8 has about 1 % noise per layer, E4M3 about 4 %; wrong scales give gaps of the size of the spread
    assert float(gap.mean()) < 0.2 * float(expected.std())
