"""Tiny random models and samples."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import random  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from qurl.types import TrainingSample  # noqa: E402

VOCAB = 300
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
}


def build_model(family: str = "qwen2", **overrides):
    """A random model with weights large enough that its distribution is far from uniform."""
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(7)
    model = model_class(config_class(**(SHAPE | extra | {"initializer_range": 0.3} | overrides)))
    return model.eval()


def build_samples(num_prompts: int = 4, num_samples: int = 3, seed: int = 0) -> list[TrainingSample]:
    """Samples of very different lengths; rollout logprobs near those of a uniform policy."""
    draw = random.Random(seed)
    samples = []
    for prompt in range(num_prompts):
        prompt_ids = [draw.randrange(3, VOCAB) for _ in range(draw.randrange(1, 6))]
        for index in range(num_samples):
            response = [draw.randrange(3, VOCAB) for _ in range(draw.randrange(1, 24))]
            blank, size = [0.0] * len(prompt_ids), len(response)
            samples.append(TrainingSample(
                sample_id=f"p{prompt}/{index}",
                token_ids=prompt_ids + response,
                loss_mask=[False] * len(prompt_ids) + [True] * size,
                rollout_logprobs=blank + [-draw.uniform(1.0, 9.0) for _ in range(size)],
                advantages=blank + [draw.choice([-1.0, 0.5, 1.5])] * size,
                reward=0.0,
                weight_version=0,
            ))
    return samples


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A saved qwen2 with tied embeddings."""
    folder = tmp_path_factory.mktemp("qwen2")
    build_model(tie_word_embeddings=True).save_pretrained(folder)
    return folder
