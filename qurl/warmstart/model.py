"""Small language models from scratch."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qurl.warmstart.tokenizer import train_tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3")
HEAD_DIM = 32  # the smallest that vLLM's CPU attention takes


def model_config(
    tokenizer: PreTrainedTokenizerBase,
    *,
    architecture: str = "qwen2",
    hidden_size: int = 256,
    num_layers: int = 4,
    intermediate_size: int | None = None,
    num_kv_heads: int | None = None,
    tie_word_embeddings: bool = False,
    max_positions: int = 2048,
) -> PreTrainedConfig:
    """Configuration of a decoder with heads of HEAD_DIM channels.

    intermediate_size: default 3 * hidden_size. num_kv_heads: default half the heads. Raises ValueError for an unknown
    architecture, a hidden size that is no multiple of HEAD_DIM and heads that the key/value heads do not divide."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r} is unknown; use one of {', '.join(ARCHITECTURES)}")
    num_heads, remainder = divmod(hidden_size, HEAD_DIM)
    if remainder or num_heads == 0:
        raise ValueError(f"hidden_size={hidden_size} is no multiple of the head size {HEAD_DIM}")
    num_kv_heads = num_kv_heads or max(1, num_heads // 2)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} does not divide the {num_heads} heads of hidden_size={hidden_size}")
    return AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=max_positions,
        initializer_range=hidden_size**-0.5,  # keeps the scale of activations through a matrix, also where it is narrow
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A float32 model on the CPU with random weights; leaves the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> Path:
    """Writes a folder that transformers and vLLM load: weights, config, tokenizer and plain-sampling generation defaults."""
    path = Path(path)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_tiny_model(
    path: str | Path,
    *,
    architecture: str = "qwen2",
    hidden_size: int = 64,
    num_layers: int = 2,
    num_kv_heads: int | None = None,
    vocab_size: int = 320,
    chat: bool = False,
    tie_word_embeddings: bool = False,
    seed: int = 0,
) -> Path:
    """A model of random weights with its tokenizer, in about a second; returns `path`.

    Biases and norms are random too, so that whatever forgets or rescales one of them changes the output."""
    tokenizer = train_tokenizer(["12+34=46\n#### 46", "What is 7 times 8? The answer is 56."], vocab_size, chat=chat)
    config = model_config(
        tokenizer,
        architecture=architecture,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        tie_word_embeddings=tie_word_embeddings,
    )
    model = new_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return save_model(model, tokenizer, path)
