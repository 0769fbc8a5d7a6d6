"""Write a Hugging Face folder in low precision that plain vLLM loads as compressed-tensors, without this project installed.

Tensors are read, encoded and written one at a time; memory holds one shard of output besides what the source itself needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qurl.quantization.base import QuantizationFormat
from qurl.quantization.targets import OUTPUT_HEAD, select_targets

SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}


@dataclass(frozen=True, slots=True)
class _Source:
    """What is exported."""

    config: dict[str, Any]  # config.json
    linear_names: list[str]
    tensors: Iterator[tuple[str, Tensor]]  # Hugging Face names, full precision; the iterator is used once
    names: frozenset[str]  # of the tensors
    files: list[Path]  # copied as they are: tokenizer, generation config, licence


def export_checkpoint(
    source: str | Path | nn.Module, out_dir: str | Path, quantization: QuantizationFormat, ignore: Sequence[str] = ()
) -> frozenset[str]:
    """Write `source` (a Hugging Face folder with safetensors, or a transformers model) to `out_dir`; returns the encoded modules.

    ignore: patterns of qurl.quantization.select_targets. Tensors of encoded modules are exactly those of
    `quantization.encode` and `checkpoint_tensors`; all others keep their values and dtype. A model brings no tokenizer; a
    folder's is copied. config.json is written last, so an interrupted export does not load.
    Raises ValueError where the source is no such folder, already quantized or a mixture of experts, out_dir is not empty or
    compressed-tensors does not have the format."""
    if quantization.scheme is None and quantization.name != "none":
        raise ValueError(f"compressed-tensors has no {quantization.name}, so nothing but qurl's engines could load the checkpoint")
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} exists and is not an empty folder; export to a new one")
    with ExitStack() as stack:
        opened = _from_model(source) if isinstance(source, nn.Module) else _from_folder(Path(source), stack)
        targets = _checked_targets(opened, quantization, ignore)
        out_dir.mkdir(parents=True, exist_ok=True)
        _write_shards(out_dir, _encoded(opened.tensors, quantization, targets))
    for file in opened.files:
        shutil.copyfile(file, out_dir / file.name)
    config = dict(opened.config)
    kept = sorted({*opened.linear_names, OUTPUT_HEAD} - targets)
    quantization_config = quantization.compressed_tensors_config(kept)
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    _write_json(out_dir / "config.json", config)
    return targets


def _from_model(model: Any) -> _Source:
    config = {**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__]}
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop(f"{OUTPUT_HEAD}.weight", None)
    return _Source(config, _linear_names(model), iter(state.items()), frozenset(state), [])


def _from_folder(folder: Path, stack: ExitStack) -> _Source:
    """Shards stay open, memory-mapped, until the stack closes."""
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    shards = _shards(folder)
    if not (folder / "config.json").is_file() or not shards:
        raise ValueError(f"{folder} is no Hugging Face folder with config.json and model*.safetensors; download or convert it")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    try:
        readers = [stack.enter_context(safe_open(shard, framework="pt")) for shard in shards]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder} is damaged: {error}; copy or download it again") from error
    tensors = ((name, reader.get_tensor(name)) for reader in readers for name in reader.keys())
    names = frozenset(name for reader in readers for name in reader.keys())
    files = [
        f for f in sorted(folder.iterdir())
        if f.is_file() and f.suffix not in WEIGHT_SUFFIXES and f.name != "config.json" and not f.name.endswith(".index.json")
    ]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return _Source(config, _linear_names(skeleton), tensors, names, files)


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


def _checked_targets(source: _Source, quantization: QuantizationFormat, ignore: Sequence[str]) -> frozenset[str]:
    if source.config.get("quantization_config"):
        raise ValueError("the source is quantized already (its config.json has a quantization_config); export a full-precision one")
    if experts := sorted(name for name in source.names if ".experts." in name):
        raise ValueError(f"the source is a mixture of experts ({experts[0]}), which export does not support")
    targets = select_targets(source.linear_names, ignore)
    if missing := sorted(name for name in targets if f"{name}.weight" not in source.names):
        raise ValueError(f"the source has no tensor {missing[0]}.weight; its names are not those of the model class")
    return targets


def _encoded(
    tensors: Iterator[tuple[str, Tensor]], quantization: QuantizationFormat, targets: frozenset[str]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        module, _, parameter = name.rpartition(".")
        if parameter != "weight" or module not in targets:
            yield name, tensor
            continue
        try:
            wire = quantization.encode(tensor)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        yield from ((f"{module}.{suffix}", part) for suffix, part in quantization.checkpoint_tensors(wire).items())


def _write_shards(out_dir: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Safetensors files of about SHARD_BYTES and their index."""
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total_bytes = shard_bytes = 0
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, out_dir / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > SHARD_BYTES:
            flush()
            shard_bytes = 0
        shard[name] = tensor.detach().cpu().contiguous()
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    _write_json(out_dir / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
