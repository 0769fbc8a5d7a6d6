"""How fast memory can be read, and how much of it the layers of an engine read: at few tokens the limit of their speed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from qurl.quantization.kernels.cpu.library import load

SMALLEST_CACHE = 1 << 25
"""Bytes that the last cache is taken to have at least."""


class MemoryReader:
    """Reads twice as much as the last cache holds: on a CPU with torch's threads, on a GPU by a copy, which also writes."""

    def __init__(self, device: str, cache_bytes: int | None = None) -> None:
        """device: cpu or cuda. cache_bytes: default what the system says. Raises KernelsUnavailable where a CPU's memory cannot be
        read fast."""
        self.is_cuda = device == "cuda"
        self.cache_bytes = cache_bytes or (_cuda_cache_bytes() if self.is_cuda else _cpu_cache_bytes())
        self.memory = torch.ones(2 * self.cache_bytes // 256 * 32, dtype=torch.int64, device=device)
        if self.is_cuda:
            self.copy = torch.empty_like(self.memory)
        else:
            self.library = load()

    def bytes_per_s(self) -> float:
        """Of one reading."""
        if not self.is_cuda:
            started = time.perf_counter()
            self.library.read(self.memory.data_ptr(), self.memory.nbytes)
            return self.memory.nbytes / (time.perf_counter() - started)
        torch.cuda.synchronize()
        started = time.perf_counter()
        self.copy.copy_(self.memory)
        torch.cuda.synchronize()
        return 2 * self.memory.nbytes / (time.perf_counter() - started)


def product_bytes(kernel: Any, layer: Any) -> int:
    """That a product of a layer of qurl reads of its weights, as they lie in memory. kernel: a LinearKernel."""
    from qurl.vllm_plugin.kernels import LinearKernel, OneDnnInt8

    for name in ("product", "kernel"):  # Ax-BxP's kernels, which hold codes for another precision beside those of the product
        if isinstance(inner := getattr(kernel, name, None), LinearKernel):
            return product_bytes(inner, layer)
    tensors = [*(value for value in vars(kernel).values() if isinstance(value, torch.Tensor)), *layer.parameters()]
    held = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
    if isinstance(kernel, OneDnnInt8):
        held += kernel.shape.rows * kernel.shape.columns  # packed where only oneDNN sees them
    return held


def linear_bytes(worker: Any) -> int:
    """For collective_rpc: product_bytes of all quantized layers of an engine."""
    linears = worker.weight_transfer_engine.installer.linears.values()
    return sum(product_bytes(method.kernel, layer) for layer, method in linears if method.kernel is not None)


def _cpu_cache_bytes() -> int:
    """Of the largest cache that a core reads through."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max([SMALLEST_CACHE, *(int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units)])


def _cuda_cache_bytes() -> int:
    return max(SMALLEST_CACHE, torch.cuda.get_device_properties(0).L2_cache_size)
