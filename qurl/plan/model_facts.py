"""Sizes of a model from its config.json alone: the architecture is built on the meta device, no weight is read."""

from __future__ import annotations

import logging
import math
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from qurl.config.model import ModelConfig
from qurl.errors import ConfigError, one_line
from qurl.plan.architecture import check_trainable
from qurl.rollout.config_json import stray_head_counts

logger = logging.getLogger(__name__)

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What memory and wire bytes depend on."""

    parameters: dict[str, tuple[int, ...]]  # Hugging Face name -> shape; a tied head is not listed
    linear_names: tuple[str, ...]
    divided_inputs: frozenset[str]  # linear modules whose inputs tensor parallelism divides; it divides the outputs of others
    base_model_prefix: str  # of the names of parameters that are not the output layer's
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int | None

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, tied ones once."""
        return sum(math.prod(shape) for shape in self.parameters.values())

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value


def read_model_facts(config: ModelConfig, section: str = "model", is_trained: bool = True) -> ModelFacts:
    """Facts of `section`.path, a folder or a hub name. Raises ConfigError where it cannot be read, or trained if it is to be."""
    key = f"{section}.path"
    _check_source(key, config.path, config.revision, "config.json")
    folder = Path(config.path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{key}={folder} is a folder without config.json; give one that a Hugging Face model was saved to")
    if config.tokenizer:
        _check_source("model.tokenizer", config.tokenizer, config.revision, "tokenizer_config.json")
    import torch
    from torch import nn
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    known = {"eager", *AttentionInterface().valid_keys()}
    if config.attn_implementation not in known and "/" not in config.attn_implementation:  # with a /: a kernel of the hub
        names = ", ".join(sorted(name for name in known if "|" not in name))
        raise ConfigError(f"model.attn_implementation={config.attn_implementation} is unknown; use one of {names}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    remote = {"trust_remote_code": config.trust_remote_code}
    try:
        found = AutoConfig.from_pretrained(config.path, revision=config.revision, **remote)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(found, **remote)
    except Exception as error:  # trust boundary: a strange config.json raises whatever the model's class trips over
        raise ConfigError(f"{key}={config.path} cannot be read as a causal language model: {_brief(error)}") from error
    text = found.get_text_config()
    linear_names = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    if getattr(found, "quantization_config", None):
        raise ConfigError(f"{key}={config.path} is a quantized checkpoint; the learner trains a full-precision one")
    if is_trained:
        check_trainable(text, model, config.attn_implementation, f"{key}={config.path}")
    stray = stray_head_counts(text)
    for name, value in stray.items():
        logger.warning("%s=%s: %s has no key %s, which config.json sets; engines take %d for it, other servers may not: remove it",
                       key, config.path, type(model).__name__, name, value)  # fmt: skip
    return ModelFacts(
        parameters={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        linear_names=linear_names,
        divided_inputs=_divided_inputs(linear_names, model.tp_plan),
        base_model_prefix=f"{model.base_model_prefix}.",
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_attention_heads if stray else getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab_size=text.vocab_size,
        max_position_embeddings=config.max_position_embeddings or getattr(text, "max_position_embeddings", None),
    )


def _divided_inputs(linear_names: tuple[str, ...], plan: Mapping[str, str]) -> frozenset[str]:
    """Those that transformers' plan for the model, pattern of names -> how, calls "rowwise"."""
    patterns = [pattern for pattern, how in plan.items() if how.startswith("rowwise")]
    return frozenset(name for name in linear_names if any(fnmatchcase(name, pattern) for pattern in patterns))


def _check_source(key: str, path: str, revision: str | None, file: str) -> None:
    """A folder, or a hub name whose `file` is cached, or the hub answers at all; transformers would retry for most of a minute
    before it says so."""
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(path).is_dir():
        return
    if Path(path).exists() or path.startswith((".", "/")) or not HUB_NAME.fullmatch(path):
        found = "is a file, no folder" if Path(path).exists() else "does not exist"
        raise ConfigError(f"{key}={path} {found}; `qurl prepare NAME` makes the model of a recipe, or give a hub name")
    if isinstance(try_to_load_from_cache(path, file, revision=revision), str):
        return
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=20).close()
    except urllib.error.HTTPError:
        return  # it answers; what it thinks of the name comes out when the model is read
    except OSError as error:
        raise ConfigError(
            f"{key}={path} is no folder here, and the hub cannot be reached ({_brief(error)}); "
            "`qurl prepare NAME` makes the model of a recipe"
        ) from error


def _brief(error: Exception) -> str:
    """The first line of what transformers words for people; any other error whole, with its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines and isinstance(error, OSError | ValueError) else one_line(error)
