"""How fast the matrix products of each format are on this CPU, measured in pairs.

A product is what an engine's linear layer does with the tokens of a decode step: encode the activations, multiply, scale. Kernels
are those that engines choose (qurl.vllm_plugin.kernels), `none` is torch's product in bfloat16, and `onednn_int8` is oneDNN's INT8
kernel also where an engine would not take it because its products are wrong on the CPU.

At few tokens weights come from memory, so each format goes around copies of its weights that together exceed the last cache
twice. What the same threads can read at best is measured in the same rounds: `bandwidth_share` says how much of that a product
used. Formats take turns of a few products, so that tables and code are in the cache as they are in an engine; a ratio is taken
within one round and the median over rounds is reported."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qurl.bench.memory import MemoryReader, product_bytes
from qurl.bench.rollout_shapes import SHAPES, linear_layers
from qurl.config.codebooks_file import resolved_codebooks
from qurl.quantization import FORMATS, QuantizationFormat, resolved_format, split_rotation
from qurl.quantization.lobcq import LoBcq

if TYPE_CHECKING:
    from torch import Tensor

ONEDNN = "onednn_int8"
"""What vLLM itself runs INT8 with on a CPU without AMX."""

ENCODED_ROWS = 256
"""Rows of a matrix that differ: speed does not depend on what weights say, and encoding takes longer than measuring."""

Product = Callable[["Tensor"], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelRow:
    """One format against the first one, for one matrix and number of tokens."""

    ratio: float  # speed over that of `baseline`, median over rounds
    ratio_min: float
    ratio_max: float
    format: str
    baseline: str
    matrix: str  # output x input features
    num_tokens: int
    time_us: float  # of a product, median over rounds
    gb_per_s: float  # of weights
    bandwidth_share: float  # of what the threads can read
    bytes_per_weight: float  # as held in memory
    num_threads: int
    kernel: str
    is_exact: bool  # whether its products are right on this CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """Copies of one matrix in one format."""

    kernel: str
    products: list[Product]
    num_bytes: int  # of a copy
    is_exact: bool = True


def run_kernel_bench(
    shapes: Sequence[str] = ("4096x4096", "1.4b"),
    formats: Sequence[str] = ("none", "int8", "axbxp_k2l2", "axbxp_k1l3", "lobcq", "lobcq_int8", "lobcq_w4a16"),
    batch_sizes: Sequence[int] = (1, 4, 16),
    *,
    num_rounds: int = 15,
    products_per_round: int = 6,
    num_threads: int | None = None,
    cache_bytes: int | None = None,
) -> list[KernelRow]:
    """Rows for every matrix, number of tokens and format.

    shapes: of models, see qurl.bench.rollout_shapes, or OUTPUTSxINPUTS. formats: LO-BCQ also with a file of codebooks, as
    lobcq:FILE; int4 and nf4 with a group size, as int4:64; with a rotation as lobcq@16. batch_sizes: numbers of tokens.
    num_threads: default all cores. cache_bytes: of the
    last cache; default what the system says. Raises ValueError for what does not exist and KernelsUnavailable where memory cannot
    be read fast."""
    import torch

    matrices = _matrices(shapes)
    unknown = [name for name in formats if split_rotation(name)[0].partition(":")[0] not in FORMATS and name != ONEDNN]
    if unknown or not formats:
        raise ValueError(f"format {unknown[0] if unknown else '(none)'!r} is unknown; use some of {', '.join([*FORMATS, ONEDNN])}")
    if not batch_sizes or min(*batch_sizes, num_rounds, products_per_round) < 1:
        counts = f"{num_rounds}, {products_per_round}"
        raise ValueError(f"batch sizes {list(batch_sizes)}, rounds and products of a round {counts} must be at least 1")
    reader = MemoryReader("cpu", cache_bytes)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or len(os.sched_getaffinity(0)))
    try:
        with torch.inference_mode():
            rows: list[KernelRow] = []
            for outputs, inputs in matrices:
                contenders = {name: _contender(name, outputs, inputs, 2 * reader.cache_bytes) for name in formats}
                for size in batch_sizes:
                    rows += _measure(contenders, outputs, inputs, size, (num_rounds, products_per_round), reader)
            return rows
    finally:
        torch.set_num_threads(before)


def _matrices(shapes: Sequence[str]) -> list[tuple[int, int]]:
    """(outputs, inputs), of a model's layers as an engine fuses them."""
    found: list[tuple[int, int]] = []
    for shape in shapes:
        if re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            outputs, inputs = map(int, shape.split("x"))
            found.append((outputs, inputs))
        elif shape in SHAPES:
            found += dict.fromkeys(linear_layers(shape))
        else:
            raise ValueError(f"shape {shape!r} is unknown; use OUTPUTSxINPUTS such as 4096x4096 or some of {', '.join(SHAPES)}")
    if not found:
        raise ValueError(f"there is no shape; use OUTPUTSxINPUTS such as 4096x4096 or some of {', '.join(SHAPES)}")
    return found


def _contender(name: str, outputs: int, inputs: int, spread: int) -> Contender:
    import torch
    from torch.nn import functional

    few = 0.02 * torch.randn(min(outputs, ENCODED_ROWS), inputs, generator=torch.Generator().manual_seed(0))
    if name != "none":
        return _quantized(name, few, outputs, spread)
    copies = [_repeated(few.bfloat16(), outputs) for _ in range(_num_copies(spread, 2 * outputs * inputs))]
    products: list[Product] = [lambda x, copy=copy: functional.linear(x, copy) for copy in copies]  # type: ignore[misc]
    return Contender(kernel="torch bfloat16", products=products, num_bytes=copies[0].nbytes)


def _repeated(rows: Tensor, count: int) -> Tensor:
    """`count` rows."""
    return rows.repeat(-(-count // len(rows)), 1)[:count]


def _quantized(name: str, few: Tensor, outputs: int, spread: int) -> Contender:
    """few: rows that are encoded and then repeated."""
    import torch

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from qurl.vllm_plugin import compat
    from qurl.vllm_plugin.kernels import LayerShape, OneDnnInt8, rows_of, select_kernel

    format = FORMATS["int8"] if name == ONEDNN else _format_named(name)
    rows = {key: _repeated(rows_of(format, key, tensor, len(few)), outputs) for key, tensor in format.encode(few).items()}
    shape = LayerShape(partitions=(outputs,), columns=few.shape[1], dtype=torch.bfloat16, device=torch.device("cpu"))

    def copies() -> Iterator[tuple[str, Product, int]]:
        while True:
            layer = torch.nn.Module()
            kernel = OneDnnInt8(shape) if name == ONEDNN else select_kernel(format, layer, shape)
            kernel.load(layer, rows)
            product = lambda x, kernel=kernel, layer=layer: kernel.apply(layer, x, None)  # type: ignore[misc]  # noqa: E731
            yield type(kernel).__name__, product, product_bytes(kernel, layer)

    source = copies()
    kernel_name, product, num_bytes = next(source)
    products = [product, *(next(source)[1] for _ in range(_num_copies(spread, num_bytes) - 1))]
    is_exact = kernel_name != OneDnnInt8.__name__ or compat.onednn_int8_is_exact()
    return Contender(kernel=kernel_name, products=products, num_bytes=num_bytes, is_exact=is_exact)


def _format_named(name: str) -> QuantizationFormat:
    plain, rotation = split_rotation(name)
    plain, colon, file = plain.partition(":")
    if colon and file.isdigit():
        return resolved_format(plain, group_size=int(file), rotation=rotation)
    format = resolved_format(plain, codebooks=resolved_codebooks(file, "--formats") if colon else None, rotation=rotation)
    if isinstance(format, LoBcq) and len(format.sets.layers) > 1:
        raise ValueError(f"--formats {name} has codebooks for each layer, and matrices here are of none; use some for all layers")
    return format


def _num_copies(spread: int, num_bytes: int) -> int:
    return max(2, -(-spread // num_bytes))


def _measure(
    contenders: dict[str, Contender], outputs: int, inputs: int, num_tokens: int, counts: tuple[int, int], reader: MemoryReader
) -> list[KernelRow]:
    """counts: of rounds, and of products in each."""
    import torch

    x = torch.randn(num_tokens, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    limit = 0.0  # bytes per second
    for contender in contenders.values():
        contender.products[-1](x)  # what is done once is done now
    num_rounds, num_products = counts
    for index in range(num_rounds):
        for name in list(contenders)[:: 1 if index % 2 == 0 else -1]:
            products = contenders[name].products
            started = time.perf_counter()
            for turn in range(index * num_products, (index + 1) * num_products):
                products[turn % len(products)](x)
            seconds[name].append((time.perf_counter() - started) / num_products)
        limit = max(limit, reader.bytes_per_s())
    baseline = next(iter(contenders))
    rows = []
    for name, contender in contenders.items():
        ratios = [base / own for base, own in zip(seconds[baseline], seconds[name], strict=True)]
        typical = statistics.median(seconds[name])
        bytes_per_s = contender.num_bytes / typical
        rows.append(KernelRow(
            ratio=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios), format=name, baseline=baseline,
            matrix=f"{outputs}x{inputs}", num_tokens=num_tokens, time_us=typical * 1e6, gb_per_s=bytes_per_s / 1e9,
            bandwidth_share=bytes_per_s / limit, bytes_per_weight=contender.num_bytes / (outputs * inputs),
            num_threads=torch.get_num_threads(), kernel=contender.kernel, is_exact=contender.is_exact,
        ))  # fmt: skip
    return rows
