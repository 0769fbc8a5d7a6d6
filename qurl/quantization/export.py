"""Write a Hugging Face folder in low precision that plain vLLM loads as compressed-tensors, without this project installed.

Tensors are read, encoded and written one at a time; memory holds one shard of output besides what the source itself needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qurl.quantization.base import QuantizationFormat
from qurl.quantization.source import INDEX, checked_targets, source_of_folder, source_of_model
from qurl.quantization.targets import OUTPUT_HEAD

SHARD_BYTES = 4 << 30


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
        raise ValueError(
            f"compressed-tensors has no {quantization.name}, so plain vLLM could not load the checkpoint; `qurl quantize SOURCE "
            f"OUT --format {quantization.name}` writes one that vLLM loads where qurl is installed"
        )
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} exists and is not an empty folder; export to a new one")
    with ExitStack() as stack:
        opened = source_of_model(source) if isinstance(source, nn.Module) else source_of_folder(Path(source), stack)
        targets = checked_targets(opened, ignore)
        out_dir.mkdir(parents=True, exist_ok=True)
        _write_shards(out_dir, _encoded(((name, opened.read(name)) for name in opened.names), quantization, targets))
    for file in opened.files:
        shutil.copyfile(file, out_dir / file.name)
    config = dict(opened.config)
    kept = sorted({*opened.linear_names, OUTPUT_HEAD} - targets)
    quantization_config = quantization.compressed_tensors_config(kept)
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    _write_json(out_dir / "config.json", config)
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
            wire = quantization.of_layer(module).encode(tensor)
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
