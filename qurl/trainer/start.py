"""Start Ray, the learner, the pool and the reward processes side by side, and end them in any case."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
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


def start_ray(config: TrainConfig) -> None:
    """Connect to cluster.address, or start a local Ray that ends with this process."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # silences a warning; a cluster's own setting wins
    os.environ.setdefault("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if config.cluster.address is not None:
        ray.init(address=config.cluster.address, logging_level="ERROR", log_to_driver=True)
        return
    ray.init(address="local", include_dashboard=False, logging_level="ERROR", log_to_driver=True, configure_logging=False)


@contextlib.asynccontextmanager
async def started_parts(
    config: TrainConfig, run_dir: Path, tokenizer: Any, resume_from: Path | None, log: RunLogger
) -> AsyncIterator[tuple[LearnerGroup, RolloutPool, RewardPool]]:
    """Learner (with the checkpoint's state), pool (engines up, without weights) and reward pool."""
    log.stage("start")
    start_ray(config)
    try:
        placement = place(config)
        learner = LearnerGroup(config, threads=placement.learner_threads, device=placement.device, run_dir=run_dir)
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
            await asyncio.gather(pool.close(), rewards.close(), learner.close(), return_exceptions=True)
    finally:
        ray.shutdown()


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
