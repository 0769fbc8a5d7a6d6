"""Which GPU each engine and each learner rank gets, on one node or on many.

Left to itself, Ray would put two ranks on one GPU where each asks for half of it, and could spread ranks so that no node has enough
GPUs left for an engine of several. So all GPUs of a run are reserved at once, as Ray's placement group: a bundle is the GPU that an
engine and a rank share, or else those of one engine, or that of one rank."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from qurl.config import TrainConfig
from qurl.config.placement import Placement, place
from qurl.trainer.interrupt import or_interrupt

ANY_BUNDLE = -1


class GpuReservation:
    """The bundles of a run; none on the CPU. Until `ready`, actors wait where they are scheduled."""

    def __init__(self, config: TrainConfig, placement: Placement):
        self._colocate, self._num_engines = config.cluster.colocate, config.rollout.num_engines
        self._timeout_s = config.cluster.stall_timeout_s
        self._first_rank = 0 if self._colocate else self._num_engines
        self._group: PlacementGroup | None = None
        if placement.device == "cuda":
            engines = [] if self._colocate else [{"GPU": float(config.rollout.tensor_parallel_size)}] * self._num_engines
            self._bundles = engines + [{"GPU": 1.0}] * config.learner.num_ranks
            self._group = placement_group(self._bundles, strategy="PACK")

    async def ready(self) -> None:
        """Wait for the cluster, which may still be growing. Raises RuntimeError where it has not the GPUs in stall_timeout_s."""
        if self._group is None:
            return
        try:
            await asyncio.wait_for(self._group.ready(), self._timeout_s)
        except TimeoutError as error:
            needed, found = sum(bundle["GPU"] for bundle in self._bundles), ray.available_resources().get("GPU", 0)
            raise RuntimeError(
                f"{needed:g} GPUs are needed, those of an engine on one node; {found:g} were free after "
                f"cluster.stall_timeout_s={self._timeout_s:g}"
            ) from error

    def of_rank(self, rank: int) -> PlacementGroupSchedulingStrategy | str:
        """Ray's scheduling_strategy of a learner rank."""
        return self._strategy(self._first_rank + rank)

    def of_engine(self, index: int) -> PlacementGroupSchedulingStrategy | str:
        """Ray's scheduling_strategy of the index-th engine that is started. One that replaces another goes where that one was, the
        only place that is free."""
        return self._strategy(index if index < self._num_engines else ANY_BUNDLE)

    def release(self) -> None:
        """Give the GPUs back; what still runs on them is ended."""
        if self._group is not None:
            remove_placement_group(self._group)

    def _strategy(self, bundle: int) -> PlacementGroupSchedulingStrategy | str:
        return "DEFAULT" if self._group is None else PlacementGroupSchedulingStrategy(self._group, bundle)


@contextlib.asynccontextmanager
async def reserved_gpus(config: TrainConfig, interrupt: asyncio.Event) -> AsyncIterator[GpuReservation]:
    """The GPUs of a run, for as long as the context lasts. Raises Interrupted where `interrupt` comes before they are there."""
    gpus = GpuReservation(config, place(config))
    try:
        await or_interrupt(gpus.ready(), interrupt)
        yield gpus
    finally:
        gpus.release()
