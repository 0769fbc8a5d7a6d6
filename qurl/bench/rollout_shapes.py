"""Random models of real dimensions, on disk as the engines load them. Speed depends on shapes, not on what the weights say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "0.4b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "1.4b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936},
}  # fmt: skip
"""Qwen2 with tied embeddings; 0.4b and 1.4b are the shapes of Qwen2.5-0.5B and -1.5B."""


def linear_layers(shape: str) -> list[tuple[int, int]]:
    """(outputs, inputs) of every linear layer but lm_head, as an engine fuses them, layer by layer."""
    sizes = SHAPES[shape]
    hidden, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    key_values = 2 * hidden // heads * sizes["num_key_value_heads"]
    return [(hidden + key_values, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)] * sizes["num_hidden_layers"]


DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def head_bytes(shape: str, dtype: str = "bfloat16") -> int:
    """Of lm_head."""
    return DTYPE_BYTES[dtype] * SHAPES[shape]["vocab_size"] * SHAPES[shape]["hidden_size"]


def write_models(shape: str, formats: Sequence[str], stock_prefix: str, folder: Path) -> dict[str, Path]:
    """A folder to load for each format: the bfloat16 checkpoint for qurl's, an exported one for `stock_prefix` + format."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from qurl.quantization import FORMATS, export_checkpoint

    sizes: dict[str, Any] = dict(SHAPES[shape])
    config = Qwen2Config(**sizes, tie_word_embeddings=True, max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = Qwen2ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.02) if "norm" not in name else parameter.fill_(1.0)
    model.tie_weights()
    model.save_pretrained(folder / "full")
    folders = {}
    for name in formats:
        if name.startswith(stock_prefix):
            export_checkpoint(folder / "full", folder / name, FORMATS[name.removeprefix(stock_prefix)])
        folders[name] = folder / (name if name.startswith(stock_prefix) else "full")
    return folders
