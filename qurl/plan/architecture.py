"""Whether learner and engines can compute an architecture, as far as its config.json and its modules tell.

What they cannot is refused here in one line, before anything starts; what only a run can tell, qurl.trainer.agreement finds when it
starts. `make matrix` trains every architecture of the README's table."""

from __future__ import annotations

from typing import Any

from torch import nn

from qurl.errors import ConfigError
from qurl.rollout.config_json import declared_keys

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Those of vLLM 0.32's attention on CPUs."""

ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers, in config.layer_types, that keep nothing but keys and values."""

LOGIT_KEYS = {"final_logit_softcapping": (None,), "logit_scale": (None, 1.0), "logits_scaling": (None, 1.0)}
"""Keys of config.json that change logits after the output layer, and the values that do not."""

ALWAYS_TIED = ("gemma", "gemma2", "gemma3_text")
"""Model types whose output layer vLLM always takes from the embedding."""

def check_trainable(config: Any, model: nn.Module, attn_implementation: str, key: str) -> None:
    """Raise ConfigError where the learner cannot train the model, or engines would compute another function.

    config: of the text part, as transformers reads it. model: built from it, may be on the meta device. key: e.g. "model.path"."""
    found = _untrainable(config, model, attn_implementation)
    if found:
        raise ConfigError(f"{key}: {type(model).__name__} {found}")


def _untrainable(config: Any, model: nn.Module, attn_implementation: str) -> str:
    """Why, and what would work; "" where nothing is known against it."""
    kinds = [kind for kind in getattr(config, "layer_types", None) or () if kind not in ATTENTION]
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv1d)]
    if kinds or convolutions:
        where = f"layers of kind {kinds[0]}" if kinds else f"a convolution over time, {convolutions[0]}"
        return (f"has {where}, whose state would pass from one sequence to the next in the learner's packed rows; "
                "use a model whose layers are attention alone")  # fmt: skip
    experts = [name for name, _ in model.named_parameters() if ".experts." in name]
    if experts:
        return f"is a mixture of experts ({experts[0]}), whose weights the stream does not carry; use a dense model"
    transposed = [name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"]
    if transposed:
        return f"keeps its weights transposed ({transposed[0]}), which the weight stream does not; use a model with linear layers"
    declared = declared_keys(config)
    for name, harmless in LOGIT_KEYS.items():
        value = getattr(config, name, None)
        if name in declared and value not in harmless:
            return (f"changes logits after its output layer ({name}={value} in config.json), which the learner does not "
                    "compute; use a model without it")  # fmt: skip
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None and attn_implementation != "eager":
        return (f"caps attention scores (attn_logit_softcapping={cap} in config.json), which "
                f"model.attn_implementation={attn_implementation} does not; use model.attn_implementation=eager")  # fmt: skip
    head = model.get_output_embeddings()  # type: ignore[operator]
    if getattr(head, "bias", None) is not None:
        return "has an output layer with a bias, which engines do not take from the weight stream; use a model without one"
    if config.model_type in ALWAYS_TIED and not config.tie_word_embeddings:
        return "has an output layer of its own, for which vLLM takes the embedding; use a model with tie_word_embeddings=true"
    return ""


def check_head_size(head_dim: int, device: str) -> None:
    """Raise ConfigError where engines on `device` ("cpu", "cuda") have no attention for heads of that size."""
    if device == "cpu" and head_dim not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        raise ConfigError(f"model.path: heads of {head_dim} channels are none that vLLM's attention has on CPUs ({sizes}); "
                          "use a model with others, or GPUs")  # fmt: skip

