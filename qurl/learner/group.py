"""The learner ranks as one object on the driver: starts them, hands each its share, joins what they return.

Consumes TrainingSamples, produces weight versions. Every method is a collective over all ranks; the driver awaits them all. Where
one rank fails the others may hang in a collective without it, so the first failure is what surfaces and the group is done with."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from qurl import hardware
from qurl.actors import portable_errors
from qurl.config import AlgorithmConfig, CriticConfig, LearnerConfig, ModelConfig, QuantizationConfig, SyncConfig
from qurl.config.placement import threads_on_nodes
from qurl.errors import remote_cause
from qurl.learner.splitting import split_for_ranks
from qurl.observability.metrics import Last, Metric, reduce_metrics
from qurl.shared_files import SharedFiles, Written, host_name, look
from qurl.sync import EngineHandle, SendReport, merge_send_reports
from qurl.sync.transports.links import NCCL_ENVIRONMENT
from qurl.types import TrainingSample

GRACE_S = 5.0
"""How long after a first error to wait for word of a dead rank, which would be its cause."""


class LearnerDied(RuntimeError):
    """A learner rank's process is gone."""


@portable_errors
class LearnerRank:
    """Body of the Ray actor of one rank; a shell around Learner, imported only there because deepspeed comes with it."""

    def address(self) -> tuple[str, int]:
        """(IP address of this node, a free port on it)."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def node(self) -> tuple[str, int]:
        """(id of this node, cores of it that may be used)."""
        return ray.get_runtime_context().get_node_id(), hardware.num_cores()

    def pid(self) -> int:
        """Process id on its node."""
        return os.getpid()

    def look(self, files: SharedFiles, who: str) -> str:
        """See qurl.shared_files."""
        return look(files, who, writes=True)

    def written(self, folder: Path) -> tuple[str, dict[str, int]]:
        """(this host, bytes of each file below `folder` as this host sees it)."""
        files = (path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith(".nfs"))
        return host_name(), {str(path.relative_to(folder)): path.stat().st_size for path in files}

    def start(self, configs: Sequence[Any], options: dict[str, Any]) -> None:
        """Build the Learner."""
        from qurl.learner.learner import Learner

        self._learner = Learner(*configs, **options)

    def call(self, method: str, *args: Any) -> Any:
        """Run one of the Learner's methods."""
        return getattr(self._learner, method)(*args)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setup:
    """What every rank is built from."""

    configs: tuple[ModelConfig, LearnerConfig, CriticConfig, AlgorithmConfig, QuantizationConfig, SyncConfig]
    options: dict[str, Any]


class LearnerGroup:
    """All learner ranks. `start` first; after an error only `close` is left."""

    def __init__(
        self,
        model: ModelConfig,
        learner: LearnerConfig,
        critic: CriticConfig,
        algorithm: AlgorithmConfig,
        quantization: QuantizationConfig,
        sync: SyncConfig,
        *,
        device: str,
        temperature: float,
        engine_dtype: str,
        threads: int,
        seed: int,
        core_share: float | None = None,
        failure_dir: Path | None = None,
        rank_options: Callable[[int], Mapping[str, Any]] = lambda rank: {},
    ):
        """device: "cpu" or "cuda", one GPU per rank. threads: OpenMP threads of a rank, >= 1. core_share: where it is given, the
        ranks of a node divide this share of its cores instead (threads_on_nodes). failure_dir: where samples of a non-finite step
        go. rank_options: of its actor, by rank, over ours (e.g. num_gpus, scheduling_strategy)."""
        self._setup = _Setup(
            configs=(model, learner, critic, algorithm, quantization, sync),
            options={
                "device": device, "temperature": temperature, "engine_dtype": engine_dtype, "threads": threads, "seed": seed,
            },
        )
        self._config = learner
        self._core_share = core_share
        self._failure_dir = failure_dir
        self._ray_options = {
            "num_cpus": 0,  # threads are dealt out by the driver, not by Ray
            "num_gpus": 1 if device == "cuda" else 0,
            "max_restarts": 0,
            "runtime_env": {"env_vars": _environment(device, threads)},
        }
        self._rank_options = rank_options
        self._ranks: list[Any] = []

    async def start(self, files: SharedFiles | None = None) -> None:
        """Start the processes and load the model. files: what each must see before that.

        Raises ConfigError for a rank that does not see them, what Learner raises, LearnerDied for a lost process."""
        actor = ray.remote(LearnerRank)
        self._ranks = [
            actor.options(**{**self._ray_options, **self._rank_options(rank)}).remote() for rank in range(self._config.num_ranks)
        ]
        if files is not None:
            names = [f"learner rank {rank}" for rank in range(len(self._ranks))]
            hosts = await self._gather([
                handle.look.remote(files, name) for handle, name in zip(self._ranks, names, strict=True)
            ])
            for name, host in zip(names, hosts, strict=True):
                files.refuse_blindness(name, host)
        [(address, port)] = await self._gather([self._ranks[0].address.remote()])
        world = {"world_size": len(self._ranks), "master_address": address, "master_port": port}
        threads = [self._setup.options["threads"]] * len(self._ranks)
        if self._core_share is not None:
            nodes = await self._gather([handle.node.remote() for handle in self._ranks])
            threads = threads_on_nodes(nodes, self._core_share)
        await self._gather([
            handle.start.remote(self._setup.configs, {**self._setup.options, **world, "rank": rank, "threads": threads[rank]})
            for rank, handle in enumerate(self._ranks)
        ])

    async def train_step(
        self, samples: Sequence[TrainingSample], trains_policy: bool = True
    ) -> tuple[dict[str, Metric], dict[str, float]]:
        """One iteration: (metrics reduced over ranks, time/* seconds of the slowest rank). trains_policy: else the critic alone.
        Raises NonFiniteLoss, LearnerDied."""
        shares = split_for_ranks(samples, self._config.num_mini_batches, len(self._ranks))
        results = await self._gather([
            handle.call.remote("train_step", share, self._failure_dir, trains_policy)
            for handle, share in zip(self._ranks, shares, strict=True)
        ])
        return _joined(results)

    async def probe(self, samples: Sequence[TrainingSample], version: int) -> tuple[dict[str, Metric], dict[str, float]]:
        """Why the policy that sampled differs from the current one, `version`; returns as train_step does. See Learner."""
        shares = split_for_ranks(samples, 1, len(self._ranks))
        return _joined(await self._gather([
            handle.call.remote("probe", share[0], version) for handle, share in zip(self._ranks, shares, strict=True)
        ]))

    async def send_weights(self, version: int, engines: Sequence[EngineHandle], full: bool = False) -> SendReport:
        """Stream all weights to the engines as `version`; full: whole tensors only. Raises SyncError, LearnerDied."""
        return merge_send_reports(await self._call_all("send_weights", version, list(engines), full))

    async def set_fallback(self, fallback: QuantizationConfig | None) -> None:
        """What engines hold from the next version on instead of the configured quantization; None: that one."""
        await self._call_all("set_fallback", fallback)

    async def decoded_weights(self, start: int, count: int) -> dict[str, Any]:
        """Linear modules as engines must hold them, decoded; see Learner."""
        return (await self._call_all("decoded_weights", start, count))[0]

    async def save_checkpoint(self, folder: Path) -> Written:
        """Every rank writes its part into `folder`, which all nodes must see. Returns what each host sees there afterwards."""
        await self._call_all("save_checkpoint", folder)
        return dict(await self._gather([handle.written.remote(folder) for handle in self._ranks]))

    async def load_checkpoint(self, folder: Path) -> None:
        """Continue bit for bit from save_checkpoint. Raises ValueError for a checkpoint of another kind of run."""
        await self._call_all("load_checkpoint", folder)

    def release_memory(self) -> None:
        """Have each rank give what it has cached of its GPU back, as soon as it is idle; does not wait."""
        for handle in self._ranks:
            handle.call.remote("release_memory")

    async def export_hf(self, folder: Path) -> None:
        """Write a Hugging Face folder."""
        await self._call_all("export_hf", folder)

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for handle in self._ranks:
            ray.kill(handle)
        self._ranks = []

    async def _call_all(self, method: str, *args: Any) -> list[Any]:
        return await self._gather([handle.call.remote(method, *args) for handle in self._ranks])

    async def _gather(self, references: Sequence[Any]) -> list[Any]:
        """The results in order, or the failure that caused the others."""
        tasks = [asyncio.ensure_future(_result(reference)) for reference in references]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if any(task.done() and task.exception() for task in tasks):
                await asyncio.wait(tasks, timeout=GRACE_S)
                errors = [error for task in tasks if task.done() and (error := task.exception())]
                raise _cause(errors) from errors[0]  # whose text is the traceback in the rank
            return [task.result() for task in tasks]
        finally:
            for task in tasks:  # those of a group that failed, or whose caller gave up
                task.cancel()


def _joined(results: Sequence[Any]) -> tuple[dict[str, Metric], dict[str, float]]:
    """The StepResults of all ranks as one."""
    reduced = reduce_metrics(report for result in results for report in result.reports)
    timings = {key: max(result.timings[key] for result in results) for key in results[0].timings}
    return {key: Last(value) for key, value in reduced.items()}, timings


async def _result(reference: Any) -> Any:
    return await reference


def _cause(errors: list[BaseException]) -> BaseException:
    """A dead process explains the errors of those that waited for it; of an error in the rank, the rank's own exception."""
    for error in errors:
        if isinstance(error, RayActorError):
            return LearnerDied(f"a learner rank died: {error}")
    return remote_cause(errors[0])


def _environment(device: str, threads: int) -> dict[str, str]:
    """Environment of a rank; threads that spin while idle would take the cores from the engines."""
    if device == "cuda":
        return NCCL_ENVIRONMENT
    return {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "1000", "DS_ACCELERATOR": "cpu"}
