"""The learner group over Ray: training, checkpoints, sending, and what becomes of a dead rank."""

import asyncio
import os
import sys
from pathlib import Path

import pytest
import ray
import torch

from qurl.config import AlgorithmConfig, CriticConfig, LearnerConfig, ModelConfig, QuantizationConfig, SyncConfig
from qurl.errors import NonFiniteLoss
from qurl.learner.group import LearnerDied, LearnerGroup
from qurl.quantization import FORMATS
from qurl.sync import WeightReceiver, publish

CASES = Path(__file__).parents[1] / "unit" / "learner"
sys.path.insert(0, str(CASES))

from learner_cases import build_model, build_samples  # noqa: E402

pytestmark = pytest.mark.e2e


class Holder:
    """An engine that only keeps the tensors it is sent."""

    def __init__(self):
        self.tensors, self.receiver = {}, WeightReceiver(self)

    def begin(self):
        self.tensors.clear()

    def install(self, tensors):
        self.tensors.update({name: tensor.clone() for name, tensor in tensors.items()})

    def finish(self):
        pass

    def begin_weight_update(self, version):
        self.receiver.begin(version)

    def receive_bucket(self, bucket):
        self.receiver.receive(bucket)

    def commit_weight_update(self, version, manifest):
        self.receiver.commit(version, manifest)
        return 0.0

    def held(self):
        return self.receiver.version, self.tensors


@pytest.fixture(scope="module")
def local_ray():
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}  # the ranks too must be able to import Holder
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=here)
    yield
    ray.shutdown()


@pytest.fixture
def model_folder(tmp_path):
    build_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def build_group(folder, failure_dir, num_ranks=2, **learner):
    return LearnerGroup(
        ModelConfig(path=str(folder)), LearnerConfig(num_ranks=num_ranks, learning_rate=1e-3, **learner), CriticConfig(),
        AlgorithmConfig(), QuantizationConfig(format="int8"), SyncConfig(), device="cpu", temperature=1.0, engine_dtype="float32",
        threads=1, seed=0, failure_dir=failure_dir,
    )


def run(group, scenario):
    """Start the group, play the scenario, close it."""

    async def play():
        try:
            await group.start()
            return await scenario()
        finally:
            group.close()

    return asyncio.run(play())


def test_a_group_trains_sends_and_resumes(local_ray, model_folder, tmp_path):
    holder = ray.remote(num_cpus=0)(Holder).remote()
    group, resumed = (build_group(model_folder, None, zero_stage=3, num_mini_batches=2) for _ in range(2))

    async def train_and_send():
        metrics, timings = await group.train_step(build_samples())
        await group.save_checkpoint(tmp_path / "checkpoint")
        second, _ = await group.train_step(build_samples(seed=1))
        report = await publish(1, group, [holder])
        await group.export_hf(tmp_path / "exported")
        return metrics, timings, second, report

    metrics, timings, second, report = run(group, train_and_send)
    assert metrics["policy/num_optimizer_steps"].value == 2 and set(timings) == {"time/logprob_s", "time/update_s"}
    assert metrics["policy/tokens"].value == sum(sum(sample.loss_mask) for sample in build_samples())
    assert not report.failed_engines
    version, tensors = ray.get(holder.held.remote())
    assert version == 1
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "exported" / "model.safetensors")
    for name, weight in exported.items():
        if name.endswith("proj.weight"):
            wire = FORMATS["int8"].encode(weight)
            assert torch.equal(tensors[name], wire["weight"]) and torch.equal(tensors[f"{name}_scale"], wire["weight_scale"])
        else:
            assert torch.equal(tensors[name], weight)

    async def resume():
        await resumed.load_checkpoint(tmp_path / "checkpoint")
        return (await resumed.train_step(build_samples(seed=1)))[0]

    assert run(resumed, resume) == second


def test_a_dead_rank_is_reported_as_such(local_ray, model_folder):
    group = build_group(model_folder, None)

    async def kill_one():
        pids = await asyncio.gather(*(rank.pid.remote() for rank in group._ranks))
        training = asyncio.ensure_future(group.train_step(build_samples(num_prompts=64, num_samples=16)))
        os.kill(pids[1], 9)
        await training

    with pytest.raises(LearnerDied, match="learner rank"):
        run(group, kill_one)


def test_a_non_finite_step_arrives_as_what_it_is_with_its_samples_saved(local_ray, model_folder, tmp_path):
    import dataclasses

    group = build_group(model_folder, tmp_path / "failures")
    bad = [dataclasses.replace(sample, advantages=[float("nan")] * len(sample.advantages)) for sample in build_samples()]
    with pytest.raises(NonFiniteLoss) as failure:
        run(group, lambda: group.train_step(bad))
    assert failure.value.sample_ids
    assert sorted(path.name for path in (tmp_path / "failures").iterdir()) == ["nonfinite_rank0.json", "nonfinite_rank1.json"]


def test_a_wrong_model_path_is_the_users_error(local_ray, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        run(build_group(tmp_path / "nowhere", None), lambda: asyncio.sleep(0))
