"""What this machine has: cores, memory, instruction sets, GPUs. Standard library; torch only where GPUs are counted."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

UNLIMITED = 1 << 62
"""Bytes where no limit is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One CUDA device."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]  # (9, 0) for Hopper


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One node, or `num_nodes` alike."""

    cpu_name: str
    cpu_flags: frozenset[str]  # as in /proc/cpuinfo; empty where the kernel does not say
    num_cores: int  # that this process may use
    memory_bytes: int  # of the container where it has a limit
    shm_bytes: int  # free in /dev/shm
    gpus: tuple[Gpu, ...]
    num_nodes: int = 1
    hidden_gpus: str = ""  # why torch sees none of the GPUs that the kernel has; "" where it has none

    @property
    def bfloat16_instructions(self) -> str:
        """What the CPU multiplies bfloat16 with: "AMX", "AVX512_BF16", "BF16" (Arm), or "" where every product is emulated."""
        known = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16", "bf16": "BF16"}
        return next((name for flag, name in known.items() if flag in self.cpu_flags), "")

    @property
    def int8_instructions(self) -> str:
        """What the CPU multiplies INT8 with: "AMX", "VNNI", or "" for nothing that vLLM's kernels could use."""
        return "AMX" if "amx_int8" in self.cpu_flags else "VNNI" if self.cpu_flags & {"avx512_vnni", "avx_vnni"} else ""


def engine_dtype(asked: str, device: str, machine: Hardware) -> str:
    """The dtype of what engines do not quantize; the one place where "auto" is resolved. device: "cpu" or "cuda".

    auto is bfloat16, but float32 on a CPU that is known to lack instructions for it, where emulated products cost a batch
    more than reading twice the bytes does (README, "Results"), and float16 on a GPU before Ampere: vLLM refuses bfloat16 there."""
    if asked != "auto":
        return asked
    if device == "cpu":
        is_unknown = not machine.cpu_flags
        return "bfloat16" if machine.bfloat16_instructions or is_unknown else "float32"
    has_bfloat16 = all(gpu.capability >= (8, 0) for gpu in machine.gpus)
    return "bfloat16" if has_bfloat16 else "float16"


def detect() -> Hardware:
    """This machine, as this process may use it."""
    name, flags = _cpu()
    return Hardware(
        cpu_name=name,
        cpu_flags=flags,
        num_cores=num_cores(),
        memory_bytes=min(psutil.virtual_memory().total, _container_memory()),
        shm_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        gpus=gpus(),
        hidden_gpus=hidden_gpus(),
    )


def num_cores() -> int:
    """Cores that this process may run on: affinity and the container's CPU quota, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        allowed = min(allowed, int(quota[0]) // int(quota[1]))
    return max(1, allowed)


def gpus() -> tuple[Gpu, ...]:
    """CUDA devices that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return ()
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(Gpu(name=p.name, memory_bytes=p.total_memory, capability=(p.major, p.minor)) for p in found)


MIN_DRIVER = {"13": 580, "12": 525}
"""NVIDIA driver that a major version of CUDA needs, https://docs.nvidia.com/deploy/cuda-compatibility."""


def hidden_gpus(devices: Path = Path("/dev"), driver: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Why torch sees no GPU although the kernel has one; "" where it has none, torch sees it, or CUDA_VISIBLE_DEVICES hides it."""
    import torch

    files = sorted(devices.glob("nvidia[0-9]*"))
    if not files or torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    cuda = torch.version.cuda
    if cuda is None:
        return f"{files[0]} exists, but torch {torch.__version__} is built without CUDA; install requirements/gpu.lock"
    match = re.search(r"Kernel Module(?: for \S+)?\s+(\d+)", _read(str(driver)))
    needed = MIN_DRIVER.get(cuda.partition(".")[0])
    found = f"driver {match[1]}" if match else "no driver version"
    if match and needed and int(match[1]) >= needed:
        return f"{files[0]} exists and driver {match[1]} is new enough for CUDA {cuda}, but torch sees no GPU; see `nvidia-smi`"
    needs = f", which needs driver {needed} or newer" if needed else ""
    return f"{files[0]} exists, but torch is built for CUDA {cuda}{needs}, and {found} is there; update the driver"


def _cpu() -> tuple[str, frozenset[str]]:
    fields = {}
    for line in _read("/proc/cpuinfo").split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = fields.get("flags", fields.get("Features", "")).split()  # Arm calls them features
    return fields.get("model name", platform.processor() or platform.machine()), frozenset(flags)


def _container_memory() -> int:
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return int(limit) if limit.isdigit() else UNLIMITED


def _read(path: str) -> str:
    """Content of a kernel file, empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
