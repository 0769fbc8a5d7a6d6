"""The weight stream on GPUs."""

import os
from pathlib import Path

import pytest
import torch

from qurl.config import SyncConfig
from qurl.quantization import FORMATS
from qurl.sync import WeightReceiver, WeightSender, fingerprint
from qurl.sync.transports.links import NCCL_ENVIRONMENT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL links join two different CUDA devices")

LINEARS = [f"layers.{k}.up_proj" for k in range(4)]


def make_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = {f"{name}.weight": torch.randn(256, 128, generator=generator) for name in LINEARS}
    return {name: tensor.cuda() for name, tensor in (weights | {"norm.weight": torch.ones(128)}).items()}


def encoded(weights, name):
    """What an engine must hold, on the host."""
    wire = {"norm.weight": weights["norm.weight"].bfloat16().cpu()}
    for module in LINEARS:
        wire |= {f"{module}.{s}": value.cpu() for s, value in FORMATS[name].encode(weights[f"{module}.weight"]).items()}
    return wire


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 777, 1 << 16, 20_000_001])
def test_the_fingerprint_is_the_same_on_both_devices(dtype, size):
    tensor = (torch.randn(size, generator=torch.Generator().manual_seed(size)) * 30).to(dtype)
    assert fingerprint(tensor.cuda()) == fingerprint(tensor)


class DictInstaller:
    """A model on the GPU that is a dictionary."""

    def __init__(self):
        self.tensors = {}

    def begin(self):
        pass

    def install(self, tensors):
        self.tensors |= {name: tensor.to("cuda", copy=True) for name, tensor in tensors.items()}

    def finish(self):
        pass


class Engine:
    """The receiver in a Ray actor."""

    def __init__(self):
        self.installer = DictInstaller()
        self.receiver = WeightReceiver(self.installer)

    def begin_weight_update(self, version):
        self.receiver.begin(version)

    def receive_bucket(self, bucket):
        self.receiver.receive(bucket)

    def commit_weight_update(self, version, manifest):
        self.receiver.commit(version, manifest)
        return {name: tensor.cpu() for name, tensor in self.installer.tensors.items()}


class Learner:
    """One sending rank in a Ray actor."""

    def __init__(self, transport, name, delta):
        config = SyncConfig(transport=transport, bucket_bytes=40_000, delta=delta, timeout_s=60.0)
        self.name = name
        self.sender = WeightSender(config, FORMATS[name], frozenset(LINEARS), torch.bfloat16, 0, 1)

    def send(self, version, seed, engines):
        """The report and what the engines must hold. Versions of one seed differ in a few entries."""
        weights = make_weights(seed)
        weights[f"{LINEARS[0]}.weight"][:, :version] += 0.5
        return self.sender.send(version, iter(weights.items()), engines), encoded(weights, self.name)


@pytest.fixture(scope="module")
def local_ray():
    import ray

    environment = {"PYTHONPATH": str(Path(__file__).parent)}  # actors import this module
    ray.init(address="local", include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    yield ray
    ray.shutdown()


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("transport", ["cuda_ipc", "object_store", pytest.param("nccl", marks=needs_two)])
def test_an_engine_in_another_process_holds_the_same_bits(local_ray, transport, name, delta):
    share = 0.3 if transport != "nccl" else 1.0
    learner = local_ray.remote(Learner).options(num_cpus=0, num_gpus=share).remote(transport, name, delta)
    engine = local_ray.remote(Engine).options(num_cpus=0, num_gpus=share).remote()
    for version in range(1, 4):
        local_ray.get(engine.begin_weight_update.remote(version))
        report, expected = local_ray.get(learner.send.remote(version, 0, [engine]))
        assert not report.failed
        held = local_ray.get(engine.commit_weight_update.remote(version, report.records))
        assert held.keys() == expected.keys()
        assert all(held[key].view(torch.uint8).equal(tensor.view(torch.uint8)) for key, tensor in expected.items())
    for actor in (learner, engine):
        local_ray.kill(actor)


class DyingEngine(Engine):
    """An engine whose process ends while its first bucket is under way."""

    def receive_bucket(self, bucket):
        bucket.payload._group({})
        os._exit(1)


@needs_two
def test_an_engine_that_dies_during_an_nccl_send_does_not_take_the_sender_with_it(local_ray):
    options = {"num_cpus": 0, "num_gpus": 1.0, "runtime_env": {"env_vars": NCCL_ENVIRONMENT}}
    learner = local_ray.remote(Learner).options(**options).remote("nccl", "int8", False)
    for kind, dies in ((DyingEngine, True), (Engine, False)):
        engine = local_ray.remote(kind).options(**options).remote()
        version = 1 if dies else 2
        local_ray.get(engine.begin_weight_update.remote(version))
        report, expected = local_ray.get(learner.send.remote(version, 0, [engine]), timeout=120)
        assert bool(report.failed) is dies
        if not dies:
            held = local_ray.get(engine.commit_weight_update.remote(version, report.records))
            assert all(held[key].view(torch.uint8).equal(t.view(torch.uint8)) for key, t in expected.items())
            local_ray.kill(engine)
    local_ray.kill(learner)
