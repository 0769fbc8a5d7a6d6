"""The Ray shell around RolloutEngine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray

from qurl.actors import portable, portable_errors
from qurl.config import ModelConfig, QuantizationConfig, RolloutConfig
from qurl.rollout.engine import EngineFailed, EngineStatus, RolloutEngine
from qurl.rollout.request import GenerationRequest
from qurl.shared_files import SharedFiles, look
from qurl.sync.transports.links import NCCL_ENVIRONMENT
from qurl.types import Rollout, TensorRecord

MAX_CONCURRENCY = 4096  # calls of one actor that may wait at the same time


@portable_errors
class EngineActor:
    """Async methods, so that status answers while the engine computes. `start` first: what it raises is the engine's own
    exception, while Ray turns one of a constructor into text."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._arguments = args, kwargs

    async def look(self, files: SharedFiles, who: str) -> str:
        """See qurl.shared_files; an engine writes nothing into the run folder."""
        return look(files, who, writes=False)

    async def start(self) -> None:
        """Build the engine."""
        args, kwargs = self._arguments
        self._engine = RolloutEngine(*args, **kwargs)

    @ray.method(num_returns="streaming")
    async def generate(self, requests: list[GenerationRequest]) -> AsyncIterator[tuple[str, list[Rollout] | Exception]]:
        """(request id, all samples in sample order or why vLLM refused the prompt), each as soon as it is done.

        Raises EngineFailed where a step of the engine raises."""
        futures = [asyncio.wrap_future(future) for future in self._engine.generate(requests)]
        names = {future: request.request_id for future, request in zip(futures, requests, strict=True)}
        waiting = set(futures)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                error = future.exception()
                if isinstance(error, EngineFailed):
                    raise error
                yield names[future], portable(error) if isinstance(error, Exception) else future.result()

    async def begin_weight_update(self, version: int) -> None:
        """See RolloutEngine."""
        await asyncio.wrap_future(self._engine.begin_weight_update(version))

    async def receive_bucket(self, bucket: Any) -> None:
        """See RolloutEngine."""
        await asyncio.wrap_future(self._engine.receive_bucket(bucket))

    async def commit_weight_update(self, version: int, manifest: list[TensorRecord]) -> float:
        """See RolloutEngine."""
        return await asyncio.wrap_future(self._engine.commit_weight_update(version, manifest))

    async def set_precision(self, precision: str | Mapping[str, str] | None) -> float:
        """See RolloutEngine."""
        return await asyncio.wrap_future(self._engine.set_precision(precision))

    async def read_back(self, module_names: list[str]) -> dict[str, Any]:
        """See RolloutEngine."""
        return await asyncio.wrap_future(self._engine.read_back(module_names))

    async def abort_all(self) -> None:
        """See RolloutEngine."""
        await asyncio.wrap_future(self._engine.abort_all())

    async def status(self) -> EngineStatus:
        """See RolloutEngine."""
        return self._engine.status()


def engine_environment(threads: int, device: str) -> dict[str, str]:
    """Environment of an engine process; must be set before it starts (OpenMP reads it once).

    A spinning OpenMP thread costs whoever shares its core a factor of ten and more, hence the short spin."""
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    }
    if device == "cuda":
        env |= NCCL_ENVIRONMENT
        env["VLLM_USE_DEEP_GEMM"] = "0"  # it rounds the scales of fp8_block to powers of two; CUTLASS takes them as they were sent
    if device == "cpu":
        env |= {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "1000", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return env


def start_engine_actor(
    model: ModelConfig,
    rollout: RolloutConfig,
    quantization: QuantizationConfig,
    *,
    engine_id: str,
    max_model_len: int,
    seed: int,
    threads: int,
    device: str,
    num_gpus: float,
    scheduling_strategy: Any = "DEFAULT",
    load_weights: bool = False,
) -> Any:
    """Handle of a new engine actor; its `start` builds the engine."""
    options: dict[str, Any] = {
        "num_cpus": 0,  # threads are split by qurl.config, not by Ray
        "num_gpus": num_gpus,
        "max_concurrency": MAX_CONCURRENCY,
        "max_restarts": 0,  # the pool replaces engines: a restarted one would have no weights
        "runtime_env": {"env_vars": engine_environment(threads, device)},
        "scheduling_strategy": scheduling_strategy,
    }
    actor = ray.remote(EngineActor).options(**options)
    return actor.remote(
        model, rollout, quantization, engine_id=engine_id, max_model_len=max_model_len, seed=seed, load_weights=load_weights
    )
