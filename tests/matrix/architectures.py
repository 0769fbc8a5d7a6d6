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
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"num_key_value_heads": 1},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 32, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma2_capped": {"model_type": "gemma2", "sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 32},
    "phi3": {"pad_token_id": 0, "original_max_position_embeddings": 256},
    "olmo2": {},
    "olmo3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"pad_token_id": 0},
    "granite": {"attention_multiplier": HEAD_DIM**-0.5},
    "granite_scaled": {"model_type": "granite", "attention_multiplier": 0.1, "logits_scaling": 8.0},
    "starcoder2": {"use_bias": True, "sliding_window": 8},
    "glm": {"pad_token_id": 0},
    "glm4": {"pad_token_id": 0},
    "gpt_neox": {},
    "exaone4": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron": {},
    "stablelm": {},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1},
    "qwen3_5_text": LINEAR_ATTENTION,
    "qwen3_next": LINEAR_ATTENTION | EXPERTS,
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 64},
    "gpt2": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 256},
    "cohere": {"logit_scale": 0.0625},
    "cohere_unscaled": {"model_type": "cohere", "logit_scale": 1.0},
    "phi": {"partial_rotary_factor": 0.5},
    "olmo": {},
    "seed_oss": {},
    "llama_heads_of_16": {"model_type": "llama", "head_dim": 16},
}
"""Name -> what its config has beyond SIZES; model_type where the name is another."""

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
