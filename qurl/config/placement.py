"""Which device and how many threads each engine and learner rank gets."""

from __future__ import annotations

import os
from dataclasses import dataclass

from qurl.config.run import Device, TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Shares of one machine (CPU) or of the cluster's GPUs."""

    device: str  # "cpu" | "cuda"
    cores: int  # of this machine
    engine_threads: int  # OpenMP threads per engine
    learner_threads: int  # OpenMP threads per learner rank
    gpus_per_engine: float
    gpus_per_rank: float


def place(config: TrainConfig) -> Placement:
    """On the CPU: with max_staleness=0 rollout and update alternate, so each side may use all cores; otherwise they run at the same
    time and threads(learner) + threads(engines) <= cores, half each (at least one per process). Explicit thread counts win."""
    device = resolve_device(config.cluster.device)
    cores = len(os.sched_getaffinity(0))
    engines, ranks = config.rollout.num_engines, config.learner.num_ranks
    overlap = config.rollout.max_staleness > 0
    learner_cores = max(1, cores // 2) if overlap else cores
    engine_cores = max(1, cores - learner_cores) if overlap else cores
    shared = 0.5 if config.cluster.colocate else 1.0
    return Placement(
        device=device,
        cores=cores,
        engine_threads=config.cluster.engine_threads or max(1, engine_cores // engines),
        learner_threads=config.cluster.learner_threads or max(1, learner_cores // ranks),
        gpus_per_engine=0.0 if device == "cpu" else shared * config.rollout.tensor_parallel_size,
        gpus_per_rank=0.0 if device == "cpu" else shared,
    )


def resolve_device(device: Device) -> str:
    """ "cpu" or "cuda"; auto takes cuda where torch sees one."""
    if device is not Device.auto:
        return device.name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
