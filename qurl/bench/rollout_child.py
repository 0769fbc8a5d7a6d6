"""The measuring process of qurl.bench.rollout: PARENT FOLDER JOB, where PARENT is the pid it dies with and JOB is JSON; writes
seconds.json into the folder. vLLM is imported only after the process is bound to its parent: that takes ten seconds."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qurl.processes import die_with_parent

if TYPE_CHECKING:
    from vllm import LLMEngine

PROMPT_TOKENS = 8
WARM_UP_STEPS = 4
KV_CACHE_BYTES = 1 << 29


def main(folder: Path, job: dict[str, Any]) -> None:
    """Measure every batch size and write, for each, format -> seconds of each round."""
    from qurl.bench.rollout import PROGRESS, STOCK
    from qurl.bench.rollout_shapes import write_models

    paths = write_models(job["shape"], job["formats"], STOCK, folder)
    engines = {
        name: build_engine(path, None if name.startswith(STOCK) else name, job["enforce_eager"]) for name, path in paths.items()
    }
    seconds: list[dict[str, list[float]]] = []
    total = job["num_rounds"] * len(job["batch_sizes"])

    def report(round_index: int) -> None:
        print(PROGRESS, job["num_rounds"] * len(seconds) + round_index + 1, total, flush=True)

    for size in job["batch_sizes"]:
        seconds.append(measure(engines, size, job["num_rounds"], job["steps_per_round"], report))
    (folder / "seconds.json").write_text(json.dumps(seconds))


def build_engine(path: Path, format_name: str | None, enforce_eager: bool) -> LLMEngine:
    """An in-process engine with the arguments of a rollout worker. format_name: of qurl; None for what the checkpoint says."""
    from vllm import EngineArgs, LLMEngine

    from qurl.vllm_plugin import engine_args

    plugin = {} if format_name is None else engine_args(format_name)
    arguments = EngineArgs(
        model=str(path), dtype="bfloat16", skip_tokenizer_init=True, generation_config="vllm", logprobs_mode="processed_logprobs",
        enforce_eager=enforce_eager, max_model_len=2048, kv_cache_memory_bytes=KV_CACHE_BYTES, enable_prefix_caching=False,
        disable_log_stats=True, use_tqdm_on_load=False, **plugin,
    )  # fmt: skip
    return LLMEngine.from_engine_args(arguments)


def measure(
    engines: dict[str, LLMEngine], batch_size: int, num_rounds: int, steps: int, report: Callable[[int], None]
) -> dict[str, list[float]]:
    """Seconds that `steps` decode steps of a full batch take, for each round; engines take turns, forwards then backwards."""
    requests = {name: start_requests(engine, batch_size, num_rounds * steps) for name, engine in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for round_index in range(num_rounds):
        for name in list(engines)[:: 1 if round_index % 2 == 0 else -1]:
            started = time.perf_counter()
            for _ in range(steps):
                engines[name].step()
            seconds[name].append(time.perf_counter() - started)
        report(round_index)
    for name, engine in engines.items():
        if engine.get_num_unfinished_requests() != batch_size:
            raise RuntimeError(f"{name} ran out of requests while it was measured")
        engine.abort_request(requests[name])
        while engine.has_unfinished_requests():
            engine.step()
    return seconds


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
