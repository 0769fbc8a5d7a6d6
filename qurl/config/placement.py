"""Which device, how many threads and which share of a GPU each process gets.

Learner ranks and engines of a CPU run share the cores. With max_staleness=0 they take turns and each side may use all of them;
otherwise both compute at once and threads(learner) + threads(engines) must stay within the cores, since OpenMP teams that compete
for a core spin against each other (a factor of ten and more)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qurl import hardware
from qurl.config.run import Device, TrainConfig
from qurl.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """What each engine and each learner rank is given."""

    device: str  # "cpu" or "cuda"
    engine_threads: int  # OpenMP threads of one engine
    learner_threads: int  # of one learner rank, on a node with as many cores as this one
    learner_core_share: float | None  # of a node's cores, for the ranks on it together; None: learner_threads as they are
    gpus_per_engine: float  # Ray's num_gpus; 0 on the CPU
    gpus_per_rank: float


def place(
    config: TrainConfig, num_gpus: int | None = None, num_cores: int | None = None, hidden_gpus: str | None = None
) -> Placement:
    """Resolve cluster.device, the thread counts and the GPU shares.

    num_gpus, num_cores, hidden_gpus: default to this machine's. Raises ConfigError where the GPUs that are asked for do not exist,
    and where auto would mean the CPU although the kernel has GPUs that torch does not see. Those of a remote cluster
    (cluster.address) are Ray's to find unless num_gpus says how many it has."""
    cluster = config.cluster
    is_known = num_gpus is not None or cluster.address is None
    if num_gpus is None:
        num_gpus, hidden_gpus = len(hardware.gpus()), hardware.hidden_gpus()
    num_cores = hardware.num_cores() if num_cores is None else num_cores
    if cluster.device is Device.cuda and is_known and num_gpus == 0:
        why = f" ({hidden_gpus})" if hidden_gpus else ""
        raise ConfigError(f"cluster.device=cuda but torch sees no CUDA device{why}; use cluster.device=cpu or cluster.address=auto")
    if cluster.device is Device.auto and cluster.address is None and num_gpus == 0 and hidden_gpus:
        remedy = "or set cluster.device=cpu or CUDA_VISIBLE_DEVICES="
        raise ConfigError(f"cluster.device=auto would train on the CPU: {hidden_gpus}, {remedy}")
    on_gpu = cluster.device is Device.cuda or (cluster.device is Device.auto and num_gpus > 0)
    if on_gpu and is_known:
        _check_gpus(config, num_gpus)
    engine_threads, learner_threads = _threads(config, num_cores)
    share = 0.5 if cluster.colocate else 1.0
    return Placement(
        device="cuda" if on_gpu else "cpu",
        engine_threads=cluster.engine_threads or engine_threads,
        learner_threads=cluster.learner_threads or learner_threads,
        learner_core_share=None if cluster.learner_threads else 1.0 if config.rollout.max_staleness == 0 else 0.5,
        gpus_per_engine=share * config.rollout.tensor_parallel_size if on_gpu else 0.0,
        gpus_per_rank=share if on_gpu else 0.0,
    )


def with_engine_dtype(config: TrainConfig) -> TrainConfig:
    """The configuration with rollout.dtype resolved for this machine, which stands for the engines' own."""
    dtype = hardware.engine_dtype(config.rollout.asked_dtype, place(config).device, hardware.detect())
    return replace(config, rollout=replace(config.rollout, dtype=dtype))


def num_gpus_needed(config: TrainConfig) -> int:
    """GPUs of a run: engines and ranks side by side, or on top of each other with cluster.colocate."""
    engines = config.rollout.num_engines * config.rollout.tensor_parallel_size
    ranks = config.learner.num_ranks
    return max(engines, ranks) if config.cluster.colocate else engines + ranks


def _check_gpus(config: TrainConfig, num_gpus: int) -> None:
    needed = num_gpus_needed(config)
    if needed <= num_gpus:
        return
    engines = f"{config.rollout.num_engines} engines x {config.rollout.tensor_parallel_size} GPUs"
    raise ConfigError(
        f"learner.num_ranks={config.learner.num_ranks} and rollout.num_engines ({engines}) need {needed} GPUs, {num_gpus} found; "
        "use fewer, or cluster.colocate=true with learner.num_ranks equal to rollout.num_engines"
    )


def _threads(config: TrainConfig, num_cores: int) -> tuple[int, int]:
    """(threads of an engine, threads of a learner rank), at least 1 each."""
    engines, ranks = config.rollout.num_engines, config.learner.num_ranks
    if config.rollout.max_staleness == 0:
        return max(1, num_cores // engines), max(1, num_cores // ranks)
    learner = max(1, num_cores // 2 // ranks)
    return max(1, (num_cores - learner * ranks) // engines), learner


def threads_on_nodes(nodes: Sequence[tuple[str, int]], core_share: float) -> list[int]:
    """Return the threads of each learner rank, at least 1: `core_share` of its node's cores, divided among the node's ranks.

    nodes: (node, cores of that node) of each rank. The cores of the driver's node say nothing about those of another.

    Example:
        >>> threads_on_nodes([("a", 64), ("a", 64), ("b", 16)], 0.5)
        [16, 16, 8]
    """
    counts = Counter(node for node, _ in nodes)
    return [max(1, int(cores * core_share) // counts[node]) for node, cores in nodes]
