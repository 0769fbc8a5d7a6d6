"""A full-precision model to be written in another form: a Hugging Face folder or a transformers model, read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qurl.quantization.targets import OUTPUT_HEAD, select_targets

INDEX = "model.safetensors.index.json"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}


@dataclass(frozen=True, slots=True)
class Source:
    """What is read."""

    config: dict[str, Any]  # config.json
    linear_names: list[str]
    shapes: dict[str, tuple[int, ...]]  # of the tensors, by Hugging Face name, in stored order
    read: Callable[[str], Tensor]  # the tensor of that name, full precision
    files: list[Path]  # copied as they are: tokenizer, generation config, licence

    @property
    def names(self) -> list[str]:
        """Of the tensors."""
        return list(self.shapes)


def source_of_model(model: Any) -> Source:
    """A transformers model in memory; it brings no tokenizer."""
    config = {**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__]}
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop(f"{OUTPUT_HEAD}.weight", None)
    return Source(config, _linear_names(model), {name: tuple(t.shape) for name, t in state.items()}, state.__getitem__, [])


def source_of_folder(folder: Path, stack: ExitStack) -> Source:
    """Shards stay open, memory-mapped, until the stack closes. Raises ValueError where it is no Hugging Face folder with
    safetensors, or damaged."""
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    shards = _shards(folder)
    if not (folder / "config.json").is_file() or not shards:
        raise ValueError(f"{folder} is no Hugging Face folder with config.json and model*.safetensors; download or convert it")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    try:
        readers = [stack.enter_context(safe_open(shard, framework="pt")) for shard in shards]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder} is damaged: {error}; copy or download it again") from error
    owners = {name: reader for reader in readers for name in reader.keys()}
    shapes = {name: tuple(reader.get_slice(name).get_shape()) for name, reader in owners.items()}
    files = [
        f for f in sorted(folder.iterdir())
        if f.is_file() and f.suffix not in WEIGHT_SUFFIXES and f.name != "config.json" and not f.name.endswith(".index.json")
    ]  # fmt: skip
    return Source(config, _linear_names(skeleton), shapes, lambda name: owners[name].get_tensor(name), files)


def checked_targets(source: Source, ignore: Sequence[str]) -> frozenset[str]:
    """The modules to quantize, by select_targets. Raises ValueError as that does, and for a source that is quantized already, a
    mixture of experts or one whose names are not those of the model class."""
    if source.config.get("quantization_config"):
        raise ValueError("the source is quantized already (its config.json has a quantization_config); give a full-precision one")
    if experts := sorted(name for name in source.shapes if ".experts." in name):
        raise ValueError(f"the source is a mixture of experts ({experts[0]}), which is not supported")
    targets = select_targets(source.linear_names, ignore)
    if missing := sorted(name for name in targets if f"{name}.weight" not in source.shapes):
        raise ValueError(f"the source has no tensor {missing[0]}.weight; its names are not those of the model class")
    return targets


def _shards(folder: Path) -> list[Path]:
    """The weight files, by the index where there is one: a folder may hold the same weights in a second layout."""
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("model*.safetensors"))
    try:
        return [folder / file for file in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged; copy or download it again") from error


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
