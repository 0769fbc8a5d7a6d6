"""The measuring process of qurl.bench.install, see qurl.bench.child."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qurl.bench.child import RESULT, report
from qurl.processes import die_with_parent

if TYPE_CHECKING:
    from torch import Tensor

    from qurl.sync import WireBucket
    from qurl.vllm_plugin.installer import WeightInstaller


def main(folder: Path, job: dict[str, Any]) -> None:
    """Write the processor seconds of every update, and of the installer in it."""
    import torch

    from qurl.bench.rollout_child import build_engine
    from qurl.quantization import FORMATS, select_targets
    from qurl.sync import WeightReceiver
    from qurl.sync.bucket import describe

    weights = _write_model(folder / "model", job["num_layers"])
    engine = build_engine(folder / "model", job["format"], True)
    worker: Any = engine.collective_rpc(lambda worker: worker)[0]
    timed = _Timed(worker.weight_transfer_engine.installer)
    receiver = WeightReceiver(timed)
    linears = [name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight")]
    targets = frozenset() if job["format"] == "none" else select_targets(linears, ())
    wire: dict[str, Tensor] = {}
    for name, weight in weights.items():
        module, _, leaf = name.rpartition(".")
        encoded = FORMATS[job["format"]].encode(weight) if module in targets and leaf == "weight" else {leaf: weight}
        wire |= {f"{module}.{suffix}": tensor for suffix, tensor in encoded.items()}
    buckets = _buckets(wire, job["tensors_per_bucket"] or len(wire))
    manifest = [describe(name, tensor) for name, tensor in wire.items()]
    totals, loads = [], []
    with torch.inference_mode():
        for version in range(job["num_rounds"] + 1):
            timed.cpu_s, started = 0.0, time.process_time()
            receiver.begin(version)
            for bucket in buckets:
                receiver.receive(_of_version(bucket, version))
            receiver.commit(version, manifest)
            totals.append(time.process_time() - started)
            loads.append(timed.cpu_s)
            report(version, job["num_rounds"])
    found = {"cpu_s": totals[1:], "load_cpu_s": loads[1:], "num_tensors": [len(wire)], "num_buckets": [len(buckets)]}
    (folder / RESULT).write_text(json.dumps(found))


def _write_model(folder: Path, num_layers: int) -> dict[str, Tensor]:
    """Save a narrow Qwen2 of random weights; they come back by name."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=num_layers, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=512, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(config)
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


class _Timed:
    """An installer whose calls are timed."""

    def __init__(self, installer: WeightInstaller) -> None:
        self._installer = installer
        self.cpu_s = 0.0

    def begin(self) -> None:
        with self._counted():
            self._installer.begin()

    def install(self, tensors: Mapping[str, Tensor]) -> None:
        with self._counted():
            self._installer.install(tensors)

    def finish(self) -> None:
        with self._counted():
            self._installer.finish()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        started = time.process_time()
        yield
        self.cpu_s += time.process_time() - started


class _Here:
    """A payload whose bytes lie in this process."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer

    @contextmanager
    def open(self, links: dict[str, Any]) -> Iterator[Tensor]:
        yield self._buffer


def _buckets(wire: Mapping[str, Tensor], size: int) -> list[WireBucket]:
    """The update in buckets of `size` tensors, of version 0."""
    from dataclasses import replace

    import torch

    from qurl.sync.bucket import WireTensor, describe, lay_out, pack

    tensors = [WireTensor(record=describe(name, tensor), pieces=(tensor,), delta=None) for name, tensor in wire.items()]
    buckets = []
    for index, start in enumerate(range(0, len(tensors), size)):
        header, pieces = lay_out(tensors[start : start + size], version=0, sender_rank=0, index=index, keep_base=False)
        buffer = torch.zeros(header.num_bytes, dtype=torch.uint8)
        pack(pieces, buffer)
        buckets.append(replace(header, payload=_Here(buffer)))
    return buckets


def _of_version(bucket: WireBucket, version: int) -> WireBucket:
    from dataclasses import replace

    return replace(bucket, version=version)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    main(Path(sys.argv[2]), json.loads(sys.argv[3]))
