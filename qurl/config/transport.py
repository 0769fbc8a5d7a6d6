"""Which transport a run uses, and whether it gets weights from every learner rank to every worker of every engine.

A pure function of the configuration, so that `qurl plan` and the start of a run refuse the same layouts with the same words."""

from __future__ import annotations

from qurl.config.run import TrainConfig
from qurl.errors import ConfigError

AUTO = "auto"


def chosen_transport(config: TrainConfig, device: str) -> str:
    """Return the name of sync.transport, with auto resolved for where engines and ranks are.

    device: "cpu" or "cuda". Worker processes of a tensor-parallel engine on the CPU are no Ray workers, so they cannot read its
    object store."""
    if config.sync.transport != AUTO:
        return config.sync.transport
    if device == "cpu":
        return "shared_memory" if config.rollout.tensor_parallel_size > 1 else "object_store"
    return "cuda_ipc" if config.cluster.colocate else "nccl"


def check_reach(config: TrainConfig, device: str, num_nodes: int | None = None) -> None:
    """Raise ConfigError, with reason and remedy, where the transport cannot deliver an update.

    num_nodes: None where it is not known, which forbids nothing."""
    name, size, ranks = chosen_transport(config, device), config.rollout.tensor_parallel_size, config.learner.num_ranks
    several_nodes = num_nodes is not None and num_nodes > 1
    asked = f"sync.transport={config.sync.transport}{f' ({name})' if config.sync.transport == AUTO else ''} cannot deliver weights"
    workers = f"an engine of rollout.tensor_parallel_size={size} has {size} workers"
    if several_nodes:
        on_one_node = "use rollout.tensor_parallel_size=1, or one node and sync.transport=shared_memory"
    else:
        on_one_node = "use sync.transport=shared_memory on one node, or rollout.tensor_parallel_size=1"
    if name == "cuda_ipc" and ranks > 1:
        raise ConfigError(
            f"{asked}: each of learner.num_ranks={ranks} ranks has a share of the weights for every engine, and CUDA IPC reaches "
            "only the engine on the rank's own GPU; use sync.transport=object_store"
        )
    if name in ("nccl", "gloo") and size > 1:
        raise ConfigError(f"{asked}: {workers}, and a link of {name} reaches one; {on_one_node}")
    if name == "object_store" and size > 1:
        raise ConfigError(f"{asked}: {workers}, which cannot read Ray's object store; {on_one_node}")
    if name == "shared_memory" and several_nodes:
        fewer = "one node, or rollout.tensor_parallel_size=1 with sync.transport=object_store"
        alternative = "sync.transport=object_store" if size == 1 else fewer
        raise ConfigError(f"{asked}: shared memory ends at a node, and there are {num_nodes}; use {alternative}")
