"""The measuring process of qurl.bench.rollout, see qurl.bench.child. vLLM is imported only after the process is bound to its
parent: that takes ten seconds."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qurl.bench.child import RESULT, report
from qurl.processes import die_with_parent

if TYPE_CHECKING:
    from vllm import LLMEngine

    from qurl.bench.memory import MemoryReader

PROMPT_TOKENS = 8
WARM_UP_STEPS = 4
KV_CACHE_BYTES = 1 << 29
GPU_SHARE = 0.05
"""What vLLM wants to be free of a GPU before an engine starts, though the cache has a size: the others are there already."""


def main(folder: Path, job: dict[str, Any]) -> None:
    """Measure every batch size and write, for each, format -> seconds of each round, and how fast memory was read in each; and
    format -> bytes of its linear layers, where it is one of qurl's."""
    import torch

    from qurl.bench.memory import MemoryReader, linear_bytes
    from qurl.bench.rollout import DTYPE, STOCK
    from qurl.bench.rollout_shapes import write_models
    from qurl.quantization.kernels.cpu.library import KernelsUnavailable

    bases = {name: name.partition(DTYPE)[0] for name in job["formats"]}
    paths = write_models(job["shape"], list(dict.fromkeys(bases.values())), STOCK, folder)
    is_eager = not torch.cuda.is_available() if job["enforce_eager"] is None else job["enforce_eager"]
    engines = {
        name: build_engine(
            paths[base], None if base.startswith(STOCK) else base, is_eager, dtype=name.partition(DTYPE)[2] or "auto"
        )
        for name, base in bases.items()
    }
    held = {
        name: engines[name].collective_rpc(linear_bytes)[0]
        for name, base in bases.items()
        if base != "none" and not base.startswith(STOCK)
    }
    try:
        reader = MemoryReader("cuda" if torch.cuda.is_available() else "cpu")
    except KernelsUnavailable:
        reader = None
    measured: list[dict[str, Any]] = []
    total = job["num_rounds"] * len(job["batch_sizes"])

    def done(round_index: int) -> None:
        report(job["num_rounds"] * len(measured) + round_index + 1, total)

    for size in job["batch_sizes"]:
        seconds, read = measure(engines, size, job["num_rounds"], job["steps_per_round"], reader, done)
        measured.append({"seconds": seconds, "read_bytes_per_s": read})
    dtypes = {name: str(engine.model_config.dtype).removeprefix("torch.") for name, engine in engines.items()}
    found: dict[str, Any] = {"dtypes": dtypes}
    found |= {"linear_bytes": held, "cache_bytes": 0 if reader is None else reader.cache_bytes, "measured": measured}
    (folder / RESULT).write_text(json.dumps(found))


def build_engine(
    path: Path, format_name: str | None, enforce_eager: bool, precision: str | None = None, dtype: str = "auto"
) -> LLMEngine:
    """An in-process engine with the arguments of a rollout worker. format_name: of qurl; None for what the checkpoint says.
    precision: as quantization.precision. dtype: as rollout.dtype."""
    import torch
    from vllm import EngineArgs, LLMEngine

    from qurl.hardware import detect, engine_dtype
    from qurl.vllm_plugin import engine_args

    plugin = {} if format_name is None else engine_args(format_name, precision=precision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        plugin["gpu_memory_utilization"] = GPU_SHARE
    arguments = EngineArgs(
        model=str(path), dtype=engine_dtype(dtype, device, detect()),  # type: ignore[arg-type]
        skip_tokenizer_init=True, generation_config="vllm", logprobs_mode="processed_logprobs",
        enforce_eager=enforce_eager, max_model_len=2048, kv_cache_memory_bytes=KV_CACHE_BYTES, enable_prefix_caching=False,
        disable_log_stats=True, use_tqdm_on_load=False, **plugin,
    )  # fmt: skip
    return LLMEngine.from_engine_args(arguments)


def measure(
    engines: dict[str, LLMEngine], batch_size: int, num_rounds: int, steps: int, reader: MemoryReader | None,
    done: Callable[[int], None],
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds that `steps` decode steps of a full batch take, for each round; engines take turns, forwards then backwards. And
    bytes of memory read in a second, in each round, if there is a reader."""
    requests = {name: start_requests(engine, batch_size, num_rounds * steps) for name, engine in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    read = []
    for round_index in range(num_rounds):
        for name in list(engines)[:: 1 if round_index % 2 == 0 else -1]:
            started = time.perf_counter()
            for _ in range(steps):
                engines[name].step()
            seconds[name].append(time.perf_counter() - started)
        if reader is not None:
            read.append(reader.bytes_per_s())
        done(round_index)
    for name, engine in engines.items():
        if engine.get_num_unfinished_requests() != batch_size:
            raise RuntimeError(f"{name} ran out of requests while it was measured")
        engine.abort_request(requests[name])
        while engine.has_unfinished_requests():
            engine.step()
    return seconds, read


def start_requests(engine: LLMEngine, batch_size: int, num_steps: int) -> list[str]:
    """Fill the batch and decode until every request is past its prompt."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    names = [f"{batch_size}-{index}" for index in range(batch_size)]
    for index, name in enumerate(names):
        sampling = SamplingParams(
            temperature=1.0, seed=index, logprobs=0, max_tokens=num_steps + 4 * WARM_UP_STEPS, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        engine.add_request(name, {"prompt_token_ids": [(index + position) % 500 for position in range(PROMPT_TOKENS)]}, sampling)
    for _ in range(WARM_UP_STEPS):
        engine.step()
    return names


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    main(Path(sys.argv[2]), json.loads(sys.argv[3]))
