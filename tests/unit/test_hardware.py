"""GPUs that the kernel has and torch does not see."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from qurl import hardware
from qurl.config import TrainConfig
from qurl.config.compose import compose
from qurl.config.placement import place, threads_on_nodes
from qurl.doctor import Level, checks
from qurl.errors import ConfigError

VERSION = "NVRM version: NVIDIA UNIX {} 550.54.15  Tue Mar  5 22:23:56 UTC 2026"


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Folders of device files and the driver's version: the arguments of hidden_gpus."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    return tmp_path / "dev", tmp_path / "version"


def test_a_machine_without_device_files_hides_nothing(kernel):
    assert hardware.hidden_gpus(*kernel) == ""


@pytest.mark.parametrize("module", ["x86_64 Kernel Module", "Open Kernel Module for x86_64"])
def test_a_driver_that_is_too_old_is_named_with_the_one_that_is_needed(kernel, monkeypatch, module):
    (kernel[0] / "nvidia0").touch()
    kernel[1].write_text(VERSION.format(module))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    told = hardware.hidden_gpus(*kernel)
    needs = "torch is built for CUDA 13.0, which needs driver 580 or newer, and driver 550 is there; update the driver"
    assert told.endswith(f"nvidia0 exists, but {needs}")
    kernel[1].write_text(VERSION.format(module).replace("550", "590"))
    assert "driver 590 is new enough" in hardware.hidden_gpus(*kernel)
    kernel[1].unlink()
    assert "no driver version is there" in hardware.hidden_gpus(*kernel)


def test_a_torch_without_cuda_is_named_and_hidden_devices_are_meant(kernel, monkeypatch):
    (kernel[0] / "nvidia3").touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA; install requirements/gpu.lock" in hardware.hidden_gpus(*kernel)
    for value in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert hardware.hidden_gpus(*kernel) == ""


def test_auto_does_not_fall_to_the_cpu_where_there_is_a_gpu(monkeypatch):
    needed = ["model.path=m", "data.train.path=d"]
    monkeypatch.setattr(hardware, "hidden_gpus", lambda: "/dev/nvidia0 exists; update the driver")
    with pytest.raises(ConfigError, match="on the CPU: /dev/nvidia0 exists; update the driver, or set cluster.device=cpu"):
        place(compose(needed), num_cores=8)
    with pytest.raises(ConfigError, match="cluster.device=cuda .*/dev/nvidia0 exists"):
        place(compose([*needed, "cluster=gpu"]), num_cores=8)
    assert place(compose([*needed, "cluster.device=cpu"]), num_cores=8).device == "cpu"
    assert place(compose(needed), num_gpus=0, num_cores=8, hidden_gpus="").device == "cpu"


def test_doctor_fails_where_a_gpu_is_hidden_and_says_what_blackwell_lacks():
    machine = dataclasses.replace(hardware.detect(), hidden_gpus="/dev/nvidia0 exists, but so; update the driver")
    [first, *_] = checks._precisions(machine)
    assert (first.level, first.found, first.fix) == (Level.fail, "/dev/nvidia0 exists, but so", "update the driver")
    words = {(8, 0): "int8 native, no fp8", (9, 0): "int8 native, fp8 native", (12, 0): "no int8, fp8 native"}
    for capability, told in words.items():
        gpu = hardware.Gpu(name="gpu", memory_bytes=80 << 30, capability=capability)
        [finding] = checks._precisions(dataclasses.replace(machine, gpus=(gpu,), hidden_gpus=""))
        assert finding.found.endswith(told)


@pytest.mark.parametrize("nodes, share, expected", [
    ([("a", 8)], 1.0, [8]),
    ([("a", 64), ("b", 16), ("a", 64)], 1.0, [32, 16, 32]),
    ([("a", 64), ("b", 16), ("a", 64)], 0.5, [16, 8, 16]),
    ([("a", 2)] * 8, 0.5, [1] * 8),
])
def test_ranks_divide_the_cores_of_their_own_node(nodes, share, expected):
    assert threads_on_nodes(nodes, share) == expected


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_on_the_drivers_node_that_is_what_the_plan_says(max_staleness, num_ranks):
    config = TrainConfig()
    config = replace(
        config, rollout=replace(config.rollout, max_staleness=max_staleness), learner=replace(config.learner, num_ranks=num_ranks)
    )
    placement = place(config, num_gpus=0, num_cores=11)
    assert threads_on_nodes([("a", 11)] * num_ranks, placement.learner_core_share) == [placement.learner_threads] * num_ranks
    config = replace(config, cluster=replace(config.cluster, learner_threads=5))
    assert place(config, num_gpus=0, num_cores=11).learner_core_share is None
