"""The weight stream between real Ray actors: two learner ranks, two engines, every transport of a machine without GPU; and which of
GPUs that Ray only believes in each actor is given."""

import asyncio
from pathlib import Path

import pytest
import ray
import torch

from qurl.config import SyncConfig
from qurl.config.compose import compose
from qurl.config.placement import place
from qurl.observability.metrics import reduce_metrics
from qurl.quantization import FORMATS
from qurl.sync import WeightReceiver, WeightSender, merge_send_reports, publish
from qurl.trainer.gpus import GpuReservation

LINEARS = [f"layers.{k}.up_proj" for k in range(6)]


def make_weights():
    generator = torch.Generator().manual_seed(0)
    return {f"{n}.weight": torch.randn(96, 64, generator=generator) for n in LINEARS} | {"norm.weight": torch.ones(64)}


def nudge(weights, seed):
    """A small update: two entries of a hundred move."""
    generator = torch.Generator().manual_seed(seed)
    return {name: w + 0.05 * (torch.rand(w.shape, generator=generator) < 0.02) for name, w in weights.items()}


def encoded(weights):
    """What an engine must hold, computed without the stream."""
    wire = {"norm.weight": weights["norm.weight"].bfloat16()}
    for name in LINEARS:
        wire |= {f"{name}.{suffix}": value for suffix, value in FORMATS["int8"].encode(weights[f"{name}.weight"]).items()}
    return wire


class DictInstaller:
    """A model that is a dictionary."""

    def __init__(self):
        self.tensors = {}

    def begin(self):
        pass

    def install(self, tensors):
        self.tensors |= {name: tensor.clone() for name, tensor in tensors.items()}

    def finish(self):
        pass


class EngineActor:
    """The receiver in a Ray actor."""

    def __init__(self):
        torch.set_num_threads(1)
        self.installer = DictInstaller()
        self.receiver = WeightReceiver(self.installer)

    def begin_weight_update(self, version):
        self.receiver.begin(version)

    def receive_bucket(self, bucket):
        self.receiver.receive(bucket)

    def commit_weight_update(self, version, manifest):
        return self.receiver.commit(version, manifest).install_s

    def state(self):
        return self.receiver.version, self.receiver.is_ready, self.installer.tensors


class SenderActor:
    """One learner rank in a Ray actor, with a sender for each transport."""

    def __init__(self, rank):
        torch.set_num_threads(1)
        self.rank = rank
        self.senders = {}

    def send(self, transport, version, weights, engines, full):
        if transport not in self.senders:
            config = SyncConfig(transport=transport, bucket_bytes=8_000, delta=True)
            self.senders[transport] = WeightSender(config, FORMATS["int8"], frozenset(LINEARS), torch.bfloat16, self.rank, 2)
        return self.senders[transport].send(version, iter(list(weights.items())[self.rank :: 2]), engines, full)


class RayLearner:
    """Two ranks."""

    def __init__(self):
        self.ranks = [ray.remote(SenderActor).options(num_cpus=0).remote(rank) for rank in range(2)]
        self.weights = make_weights()
        self.transport = "auto"

    async def send_weights(self, version, engines, full):
        calls = [rank.send.remote(self.transport, version, self.weights, engines, full) for rank in self.ranks]
        return merge_send_reports(await asyncio.gather(*calls))


@pytest.fixture(scope="module")
def local_ray():
    environment = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}  # actors import this module
    ray.init(
        address="local", num_cpus=2, num_gpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20,
        runtime_env={"env_vars": environment},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.mark.e2e
def test_two_ranks_and_two_engines_as_ray_actors_survive_the_loss_of_an_engine(local_ray):
    config = SyncConfig(max_retries=1, timeout_s=60.0)
    learner, engines = RayLearner(), [ray.remote(EngineActor).options(num_cpus=0).remote() for _ in range(2)]

    def assert_published(version, engines, full=False):
        learner.weights = nudge(learner.weights, seed=version)
        report = asyncio.run(publish(version, learner, engines, config=config, full=full))
        assert report.failed_engines == [] and reduce_metrics([report.metrics])["sync/retry_count"] == 0
        for held_version, is_ready, tensors in ray.get([engine.state.remote() for engine in engines]):
            assert (held_version, is_ready) == (version, True)
            expected = encoded(learner.weights)
            assert tensors.keys() == expected.keys()
            assert all(tensors[n].dtype == t.dtype and tensors[n].equal(t) for n, t in expected.items())

    for version, transport in enumerate(["gloo", "shared_memory", "auto"]):
        learner.transport = transport
        assert_published(2 * version, engines, full=True)  # another sender: it does not know what engines hold
        assert_published(2 * version + 1, engines)
    ray.kill(engines[0])
    assert asyncio.run(publish(6, learner, engines, config=config)).failed_engines == [engines[0]]
    fresh = ray.remote(EngineActor).options(num_cpus=0).remote()
    assert asyncio.run(publish(6, learner, [fresh], config=config, full=True)).failed_engines == []
    assert_published(7, [engines[1], fresh])


class Tenant:
    """An actor that knows its GPUs."""

    def gpus(self):
        return sorted(ray.get_gpu_ids())


def settle(overrides, num_engines, num_ranks):
    """(GPUs of engines, GPUs of ranks) of a run; the first engine is then lost and replaced."""
    config = compose(["model.path=m", "cluster.device=cuda", *overrides])
    placement = place(config, num_gpus=4)
    reservation = GpuReservation(config, placement)
    asyncio.run(reservation.ready())
    actor = ray.remote(Tenant)

    def start(num_gpus, strategy):
        return actor.options(num_cpus=0, num_gpus=num_gpus, scheduling_strategy=strategy).remote()

    started = [start(placement.gpus_per_engine, reservation.of_engine(index)) for index in range(num_engines)]
    ranks = [start(placement.gpus_per_rank, reservation.of_rank(rank)) for rank in range(num_ranks)]
    found = [ray.get([tenant.gpus.remote() for tenant in tenants]) for tenants in (started, ranks)]
    ray.kill(started[0])
    replacement = start(placement.gpus_per_engine, reservation.of_engine(num_engines))
    assert ray.get(replacement.gpus.remote()) == found[0][0]
    reservation.release()
    return found


@pytest.mark.e2e
def test_an_engine_and_a_rank_share_a_gpu_or_have_their_own(local_ray):
    engines, ranks = settle(["cluster.colocate=true", "rollout.num_engines=2", "learner.num_ranks=2"], 2, 2)
    assert engines == ranks and engines[0] != engines[1]
    engines, ranks = settle(["rollout.tensor_parallel_size=2", "learner.num_ranks=2"], 1, 2)
    assert len(engines[0]) == 2 and len({*engines[0], *ranks[0], *ranks[1]}) == 4
    config = compose(["model.path=m", "cluster.device=cuda", "learner.num_ranks=4", "cluster.stall_timeout_s=0.1"])
    with pytest.raises(RuntimeError, match="5 GPUs are needed"):
        asyncio.run(GpuReservation(config, place(config, num_gpus=5)).ready())
