"""Start Ray, then the learner, the pool and the reward processes side by side, and end them in any case."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from qurl.config import QuantizationConfig, TrainConfig
from qurl.config.paths import shared_paths
from qurl.config.placement import Placement, place
from qurl.config.transport import chosen_transport
from qurl.errors import ConfigError, one_line, remote_cause
from qurl.learner.group import LearnerGroup
from qurl.rewards import RewardPool
from qurl.rollout.actor import start_engine_actor
from qurl.rollout.pool import RolloutPool
from qurl.shared_files import shared_files
from qurl.trainer.gpus import GpuReservation
from qurl.trainer.interrupt import or_interrupt

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0


@contextlib.contextmanager
def ray_session(config: TrainConfig) -> Iterator[Path]:
    """Connect to cluster.address, or start a local Ray that ends with the context. Yields the folder of Ray's logs.

    Raises ConfigError where nothing answers at cluster.address."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # silences a warning; a cluster's own setting wins
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # one per core, idle: our actors have their own environment
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # tensors of an audit: nobody writes to them
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.cluster.address is None:
        options |= {"address": "local", "include_dashboard": False}
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves engines and ranks beside anything else
    else:
        options |= {"address": config.cluster.address}
    try:
        _probe(config.cluster.address)
        context: Any = _local_ray(options) if config.cluster.address is None else ray.init(**options)
    except OSError as error:
        raise ConfigError(
            f"cluster.address={config.cluster.address}: no Ray cluster answers ({one_line(error)}); start one with "
            "`ray start --head`, or use cluster.address=null"
        ) from error
    if config.cluster.address is not None:
        logger.info("workers of a Ray that is not ours have the niceness that it was started with, 15 by default; "
                    "RAY_worker_niceness=0 in front of `ray start` keeps other programs from starving them")  # fmt: skip
    logs = Path(context.address_info["session_dir"]) / "logs"
    logger.info("%s holds the output of engines and learner ranks", logs)
    try:
        yield logs
    finally:
        ray.shutdown()


def _local_ray(options: dict[str, Any]) -> Any:
    """Start Ray, once more where it does not come up: its raylet gives its agents half a minute, which a busy machine exceeds.

    Raises RuntimeError that says how busy the machine is."""
    try:
        return ray.init(**options)
    except Exception as error:  # trust boundary: Ray raises a bare Exception where the raylet has died
        logger.warning("a local Ray did not start (%s); %s; trying once more", one_line(error), _load())
        ray.shutdown()
    try:
        return ray.init(**options)
    except Exception as error:
        told = f"a local Ray did not start: {one_line(error)}; {_load()}; start the command again when it is less busy"
        raise RuntimeError(told) from error


def _load() -> str:
    return f"this machine has a load of {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"


def _probe(address: str | None) -> None:
    """Raises OSError where nothing listens at host:port; Ray itself would try for minutes."""
    host, _, port = (address or "").rpartition("//")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


@contextlib.asynccontextmanager
async def started_parts(
    config: TrainConfig,
    run_dir: Path,
    ray_logs: Path,
    gpus: GpuReservation,
    tokenizer: Any,
    resume_from: Path | None,
    interrupt: asyncio.Event,
    *,
    fallback: QuantizationConfig | None = None,
) -> AsyncIterator[tuple[LearnerGroup, RolloutPool, RewardPool]]:
    """Learner (with the checkpoint's state), pool (engines up, without weights) and reward pool. fallback: of guard, what
    engines run instead of config.quantization from the start.

    Raises Interrupted where `interrupt` comes first, ValueError for what the user must change, else RuntimeError."""
    placement = place(config)
    learner = _learner(config, placement, gpus, run_dir)
    pool = RolloutPool(
        config.rollout,
        engine_starter(config, gpus, learner, config.quantization if fallback is None else fallback),
        run_seed=config.seed,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
    )
    rewards = RewardPool(config.reward)

    async def start_learner() -> None:
        with naming("the learner did not start", ray_logs):
            await learner.start(files)
        if resume_from is not None:
            with naming(f"checkpoint {resume_from} was not loaded", ray_logs):
                await learner.load_checkpoint(resume_from)
        await learner.set_fallback(fallback)

    async def start_pool() -> None:
        with naming("the rollout engine did not start", ray_logs):
            await pool.start(files)

    try:
        with shared_files(run_dir, shared_paths(config)) as files:
            starting = (
                _one_after_the_other(start_pool(), start_learner()) if shares_gpus(config, placement)
                else _side_by_side(start_learner(), start_pool())
            )
            await or_interrupt(_side_by_side(starting, rewards.start()), interrupt)
        yield learner, pool, rewards
    finally:
        learner.close()
        await asyncio.gather(pool.close(), rewards.close(), return_exceptions=True)


def shares_gpus(config: TrainConfig, placement: Placement) -> bool:
    """Whether a learner rank and an engine are on the same GPU. vLLM measures free memory before and after a trial run and takes
    whatever else changes in between for its own, so nothing else may start meanwhile."""
    return config.cluster.colocate and placement.device == "cuda"


async def _one_after_the_other(*works: Coroutine[Any, Any, None]) -> None:
    try:
        for work in works:
            await work
    finally:
        for work in works:
            work.close()  # of those that an error kept from their turn


async def _side_by_side(*works: Coroutine[Any, Any, None]) -> None:
    await asyncio.gather(*works)


@contextlib.contextmanager
def naming(what: str, ray_logs: Path) -> Iterator[None]:
    """Says what failed, and where its output is: ValueError if an actor raised one, RuntimeError for all else. A ConfigError, which
    names a key and a remedy, passes."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # trust boundary: vLLM, DeepSpeed and transformers raise whatever they like
        cause = remote_cause(error)
        kind = ValueError if isinstance(cause, ValueError) else RuntimeError
        raise kind(f"{what}: {one_line(cause)}; the whole output is in {ray_logs}") from error


def _learner(config: TrainConfig, placement: Placement, gpus: GpuReservation, run_dir: Path) -> LearnerGroup:
    return LearnerGroup(
        config.model,
        config.learner,
        config.critic,
        config.algorithm,
        config.quantization,
        replace(config.sync, transport=chosen_transport(config, placement.device)),
        device=placement.device,
        temperature=config.rollout.temperature,
        engine_dtype=config.rollout.dtype,
        threads=placement.learner_threads,
        core_share=placement.learner_core_share,
        seed=config.seed,
        failure_dir=run_dir / "failures",
        rank_options=lambda rank: {"num_gpus": placement.gpus_per_rank, "scheduling_strategy": gpus.of_rank(rank)},
    )


def engine_starter(
    config: TrainConfig, gpus: GpuReservation, learner: LearnerGroup, quantization: QuantizationConfig
) -> Callable[[str], Any]:
    """What starts an engine of the pool. Ranks that share its GPU give back what they have cached, which a successor needs."""
    placement = place(config)
    start = _engine_starter(config, gpus, placement, quantization)
    if not shares_gpus(config, placement):
        return start

    def start_beside_learner(engine_id: str) -> Any:
        learner.release_memory()
        return start(engine_id)

    return start_beside_learner


def _engine_starter(
    config: TrainConfig, gpus: GpuReservation, placement: Placement, quantization: QuantizationConfig
) -> Callable[[str], Any]:
    return lambda engine_id: start_engine_actor(
        config.model,
        config.rollout,
        quantization,
        engine_id=engine_id,
        max_model_len=config.longest_tokens,
        seed=config.seed,
        threads=placement.engine_threads,
        device=placement.device,
        num_gpus=placement.gpus_per_engine,
        scheduling_strategy=gpus.of_engine(int(engine_id)),
    )
