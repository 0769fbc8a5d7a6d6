"""Tiny random models of many architectures, each in the forms in which checkpoints come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from qurl.warmstart.model import new_model, save_model
from qurl.warmstart.tokenizer import train_tokenizer

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS = 64, 2, 1, 32, 192, 2
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
LINEAR_ATTENTION = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
WINDOW = {"sliding_window": 8}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
TIED = {"tie_word_embeddings": True}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma": TIED,
    "gemma2": TIED | WINDOW | {"query_pre_attn_scalar": 32, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma3_text": TIED | WINDOW | ALTERNATING | {"query_pre_attn_scalar": 32},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"pad_token_id": 0, "original_max_position_embeddings": 256},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW | ALTERNATING,
    "smollm3": {"pad_token_id": 0},
    "granite": {"attention_multiplier": HEAD_DIM**-0.5},
    "starcoder2": WINDOW | {"use_bias": True},
    "glm": {"pad_token_id": 0},
    "glm4": {"pad_token_id": 0},
    "gpt_neox": {},  # does not know num_key_value_heads, which SIZES sets
    "exaone4": WINDOW | ALTERNATING,
    "nemotron": {},
    "stablelm": {},
    "seed_oss": {},
    "cohere": TIED | {"logit_scale": 1.0},
    "gemma2_capped": {"model_type": "gemma2"} | TIED | WINDOW,
    "gemma2_capped_attention": {"model_type": "gemma2", "final_logit_softcapping": None} | TIED | WINDOW,
    "gemma2_untied": {"model_type": "gemma2", "attn_logit_softcapping": None, "final_logit_softcapping": None} | WINDOW,
    "granite_scaled": {"model_type": "granite", "attention_multiplier": 0.1, "logits_scaling": 8.0},
    "cohere_scaled": {"model_type": "cohere", "logit_scale": 0.0625} | TIED,
    "gpt2": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 256},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1},
    "qwen3_5_text": LINEAR_ATTENTION,
    "qwen3_next": LINEAR_ATTENTION | EXPERTS,
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 64},
    "llama_heads_of_16": {"model_type": "llama", "head_dim": 16},
    "llama_scaled_by_vllm": {"model_type": "llama", "logit_scale": 0.5},  # a key that vLLM reads and transformers does not
}
"""Name -> what its config has beyond SIZES; model_type where the name is another."""

REFUSED = {
    "gemma2_capped": "final_logit_softcapping=30.0",
    "gemma2_capped_attention": "attn_logit_softcapping=50.0",
    "gemma2_untied": "vLLM takes the embedding",
    "granite_scaled": "logits_scaling=8.0",
    "cohere_scaled": "logit_scale=0.0625",
    "gpt2": "weights transposed",
    "phi": "output layer with a bias",
    "falcon_h1": "layers of kind hybrid",
    "qwen3_5_text": "layers of kind linear_attention",
    "qwen3_next": "layers of kind linear_attention",
    "mixtral": "mixture of experts",
    "qwen3_moe": "mixture of experts",
    "llama_heads_of_16": "heads of 16 channels",
}
"""Refused before anything starts -> part of the line."""

DIFFERENT = ("llama_scaled_by_vllm",)
"""Refused when engine and learner have started and are compared."""

TRAINED = tuple(name for name in ARCHITECTURES if name not in REFUSED and name not in DIFFERENT)

MULTIPLY = ("gpt2",)
"""Configs with names of their own for sizes, which would not take ours."""


def tiny_config(name: str, tokenizer: Any) -> Any:
    """The architecture's configuration with sizes of some ten thousand weights."""
    given = dict(ARCHITECTURES[name])
    model_type = given.pop("model_type", name)
    sizes = {} if model_type in MULTIPLY else SIZES
    ends = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    return AutoConfig.for_model(model_type, **{"pad_token_id": tokenizer.pad_token_id, **sizes, **ends, **given})


def tiny_model(name: str, tokenizer: Any, seed: int = 0) -> PreTrainedModel:
    """Random weights; vectors are random too, so that whatever forgets one of them changes the output."""
    model = new_model(tiny_config(name, tokenizer), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return model


def save_tiny(name: str, folder: Path, save: Callable[[PreTrainedModel, Path], None] | None = None) -> Path:
    """A folder that transformers and vLLM load. save: how the weights are written, over the usual single file."""
    tokenizer = train_tokenizer(["12+34=46\n#### 46", "What is 7 times 8? The answer is 56."], 320)
    model = tiny_model(name, tokenizer)
    save_model(model, tokenizer, folder)
    if save is not None:
        for file in folder.glob("*.safetensors"):
            file.unlink()
        save(model, folder)
    return folder
