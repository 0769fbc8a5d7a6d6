"""Start Ray, the learner, the pool and the reward processes side by side, and end them in any case."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from qurl.config import TrainConfig
from qurl.config.placement import Placement, place
from qurl.learner.group import LearnerGroup
from qurl.observability.run_logger import RunLogger
from qurl.rewards import RewardPool
from qurl.rollout.actor import start_engine_actor
from qurl.rollout.pool import RolloutPool
from qurl.sync.transports import AUTO, choose_transport

logger = logging.getLogger(__name__)


def start_ray(config: TrainConfig) -> None:
    """Connect to cluster.address, or start a local Ray that ends with this process."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # silences a warning; a cluster's own setting wins
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.cluster.address is None:
        options |= {"address": "local", "include_dashboard": False}
    else:
        options |= {"address": config.cluster.address}
    ray.init(**options)
    logger.info("Ray session %s; its logs folder holds the output of engines and learner ranks",
                ray.get_runtime_context().get_session_name())  # fmt: skip


@contextlib.asynccontextmanager
async def started_parts(
    config: TrainConfig, run_dir: Path, tokenizer: Any, resume_from: Path | None, log: RunLogger
) -> AsyncIterator[tuple[LearnerGroup, RolloutPool, RewardPool]]:
    """Learner (with the checkpoint's state), pool (engines up, without weights) and reward pool."""
    log.stage("start")
    start_ray(config)
    try:
        placement = place(config)
        learner = _learner(config, placement, run_dir)
        pool = RolloutPool(
            config.rollout,
            lambda engine_id: _start_engine(config, placement, engine_id),
            run_seed=config.seed,
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        )
        rewards = RewardPool(config.reward)
        try:
            await asyncio.gather(learner.start(), pool.start(), rewards.start())
            if resume_from is not None:
                await learner.load_checkpoint(resume_from)
            yield learner, pool, rewards
        finally:
            learner.close()
            await asyncio.gather(pool.close(), rewards.close(), return_exceptions=True)
    finally:
        ray.shutdown()


def _learner(config: TrainConfig, placement: Placement, run_dir: Path) -> LearnerGroup:
    return LearnerGroup(
        config.model,
        config.learner,
        config.algorithm,
        config.quantization,
        replace(config.sync, transport=_transport(config, placement)),
        device=placement.device,
        temperature=config.rollout.temperature,
        engine_dtype=config.rollout.dtype,
        threads=placement.learner_threads,
        seed=config.seed,
        failure_dir=run_dir / "failures",
        ray_options={"num_gpus": placement.gpus_per_rank},
    )


def _transport(config: TrainConfig, placement: Placement) -> str:
    """sync.transport, auto resolved for where engines and ranks are. Worker processes of a tensor-parallel engine on the CPU are
    no Ray workers, so they cannot read its object store."""
    if config.sync.transport == AUTO and placement.device == "cpu" and config.rollout.tensor_parallel_size > 1:
        return "shared_memory"
    return choose_transport(config.sync.transport, device=placement.device, colocate=config.cluster.colocate)


def _start_engine(config: TrainConfig, placement: Placement, engine_id: str) -> Any:
    return start_engine_actor(
        config.model,
        config.rollout,
        config.quantization,
        engine_id=engine_id,
        max_model_len=config.data.max_prompt_tokens + max(
            config.rollout.max_response_tokens, config.evaluation.max_response_tokens or 0
        ),
        seed=config.seed,
        threads=placement.engine_threads,
        device=placement.device,
        num_gpus=placement.gpus_per_engine,
    )  # fmt: skip
