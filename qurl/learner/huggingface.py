"""Model folders of Hugging Face: reading the policy, and what an exported folder needs besides weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, PreTrainedModel

from qurl.config import ModelConfig

TOKENIZER_FILES = [
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.tiktoken",
]


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The causal language model of model.path on the CPU, in float32. Raises OSError where it cannot be read."""
    return AutoModelForCausalLM.from_pretrained(
        config.path,
        revision=config.revision,
        dtype=torch.float32,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
    )


def copy_tokenizer(config: ModelConfig, folder: Path) -> None:
    """Copy the tokenizer's files unchanged: loading and saving one can change it (transformers picks the class by model type)."""
    path = config.tokenizer or config.path
    revision = None if config.tokenizer else config.revision
    source = Path(path) if Path(path).is_dir() else Path(snapshot_download(path, revision=revision, allow_patterns=TOKENIZER_FILES))
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
