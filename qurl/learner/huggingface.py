"""Model folders of Hugging Face: reading the policy, and what an exported folder needs besides weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qurl.config import ModelConfig
from qurl.errors import ConfigError

TOKENIZER_FILES = [
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.tiktoken",
]


def load_model(config: ModelConfig, section: str = "model") -> PreTrainedModel:
    """The causal language model of `section`.path on the CPU, in float32.

    Raises OSError where it cannot be read, ValueError where a weight is missing, has another shape or is not finite: transformers
    would put random numbers in place of the first two."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        config.path,
        revision=config.revision,
        dtype=torch.float32,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, found = loaded
    wrong = [f"{name} is missing" for name in sorted(found["missing_keys"])]
    wrong += [f"{name} has shape {tuple(a)}, config.json says {tuple(b)}" for name, a, b in sorted(found["mismatched_keys"])]
    wrong += [f"{name} is not finite" for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{section}.path={config.path}: {wrong[0]}{more}; give a complete checkpoint")
    return model


def check_weight_files(config: ModelConfig, section: str = "model") -> None:
    """Raises ConfigError where `section`.path is a folder without weights, with a file that is missing or cut short, or with
    weights of other shapes than config.json says; reads no weight."""
    key, folder = f"{section}.path", Path(config.path)
    if not folder.is_dir():
        return
    files = _indexed_files(folder, key) or sorted(folder.glob("*.safetensors"))
    if not files and not list(folder.glob("*.bin")):
        raise ConfigError(f"{key}={config.path} has no weights; give a folder that a Hugging Face model was saved to")
    with torch.device("meta"):
        found = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        model = AutoModelForCausalLM.from_config(found, trust_remote_code=config.trust_remote_code)
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for file in files:
        try:
            with safe_open(file, "pt") as reader:
                shapes = {name: reader.get_slice(name).get_shape() for name in reader.keys()}
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{key}={config.path}: {file.name} is damaged ({error}); copy or download it again") from error
        for name in shapes.keys() & expected.keys():
            if shapes[name] != expected[name]:
                raise ConfigError(f"{key}={config.path}: {name} in {file.name} has shape {tuple(shapes[name])}, config.json "
                                  f"says {tuple(expected[name])}; one of the two is another model's")  # fmt: skip


def _indexed_files(folder: Path, key: str) -> list[Path]:
    """The files that the folder's index names; none where it has no index. Raises ConfigError for an unusable index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():  # transformers reads a single file first
        return []
    try:
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}={folder}: {index.name} is damaged; copy or download it again") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = f"{missing[0]} is missing (of {len(files)} files" if missing else "no file is named (anywhere"
        raise ConfigError(f"{key}={folder}: {what} in {index.name}); copy or download the folder again")
    return files


def copy_tokenizer(config: ModelConfig, folder: Path) -> None:
    """Copy the tokenizer's files unchanged: loading and saving one can change it (transformers picks the class by model type)."""
    path = config.tokenizer or config.path
    revision = None if config.tokenizer else config.revision
    source = Path(path) if Path(path).is_dir() else Path(snapshot_download(path, revision=revision, allow_patterns=TOKENIZER_FILES))
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
