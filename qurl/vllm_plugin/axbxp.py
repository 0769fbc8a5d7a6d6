"""Ax-BxP in an engine, whose precision can be set while it lives.

A layer keeps the INT8 codes that came over the wire, and beside them the codes that it multiplies with: those without the blocks
that the precision drops. Activations get their codes as in int8, then lose blocks by a lookup. What follows is int8's own product,
at int8's speed; the set without LL is one product over twice the inputs, [A, -A_L] [W, W_L]^T.

    llm = LLM(..., **engine_args("axbxp"))
    switch_precision(llm, "k4-w1-a2")                                   # the whole model
    switch_precision(llm, {"down_proj": "k2-w4-a4", "re:.*": "k4-w1-a2"})

After a switch the engine computes what one started with that `quantization.precision` does, and takes weight updates as before.
Codes that are multiplied and lookups stay in their storage, which captured CUDA graphs read; how a graph's operations follow each
other does not change, so on a GPU the group of the activations and -noll are those that the engine was started with. Where tensor
parallelism divides the inputs of a layer, groups begin anew with each rank's part: they are those of a single rank where a part is
a multiple of the group.

Packed formats hold the kept blocks alone, and their precision is fixed. On the CPU they stay packed, and C++ that is compiled on
first use (qurl.vllm_plugin.int8) expands them as it multiplies. Elsewhere, and where there is no compiler, they are expanded when
they are loaded and run as int8."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qurl.quantization import FORMATS
from qurl.quantization.axbxp import AxBxP, PackedAxBxP, Precision
from qurl.quantization.axbxp.blocks import activation_table, keep, look_up, lower_parts, lower_table, weight_table
from qurl.quantization.base import QuantizationFormat
from qurl.quantization.kernels.cpu.library import KernelsUnavailable
from qurl.vllm_plugin import compat, int8
from qurl.vllm_plugin.kernels import (
    CodeKernel,
    CodeProduct,
    LayerShape,
    LinearKernel,
    cpu_code_product,
    into_storage,
    select_kernel,
    warn_once,
)

MOST_ROWS = 7
"""Of a lookup: blocks of one bit, one of them kept."""


def select_axbxp_kernel(format: AxBxP, layer: Any, shape: LayerShape) -> LinearKernel:
    """The kernel of a layer. Raises ValueError where the device has none."""
    if not isinstance(format, PackedAxBxP):
        return AxBxPKernel(format, shape)
    if int8.is_for(format, shape):
        try:
            return int8.CompiledInt8(format, shape)
        except KernelsUnavailable as error:
            warn_once(f"{format.name} is expanded to INT8 when it is loaded ({error})")
    return ExpandedAxBxP(format, layer, shape)


class ExpandedAxBxP(LinearKernel):
    """A packed format as int8."""

    def __init__(self, format: PackedAxBxP, layer: Any, shape: LayerShape) -> None:
        self.format = format
        self.kernel = select_kernel(FORMATS["int8"], layer, shape)

    def load(self, layer: Any, rows: Mapping[str, Tensor]) -> None:
        self.kernel.load(layer, {"weight": self.format.codes(rows), "weight_scale": rows["weight_scale"]})

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.kernel.apply(layer, x, bias)

    def decoded(self, layer: Any, format: QuantizationFormat, partitions: Sequence[int]) -> list[Tensor]:
        return self.kernel.decoded(layer, FORMATS["int8"], partitions)


class AxBxPKernel(CodeKernel):
    """int8's codes and the product of those without the dropped blocks."""

    def __init__(self, format: AxBxP, shape: LayerShape) -> None:
        self.shape = shape
        self.precision = format.precision
        self.codes = self.scale = torch.empty(0)
        self.product = self._new_product()

    def load(self, layer: Any, rows: Mapping[str, Tensor]) -> None:
        self.codes = into_storage(self.codes, rows["weight"])
        self.scale = into_storage(self.scale, rows["weight_scale"])
        self._apply_precision(layer)

    def check_switch(self, precision: Precision) -> None:
        """Raises ValueError for a precision that the layer cannot change to while it lives."""
        if self.shape.device.type == "cpu" or precision.structure == self.precision.structure:
            return
        raise ValueError(
            f"the precision {precision} has other groups of activations than {self.precision}, or differs in -noll, and CUDA "
            f"graphs have been captured with the latter; start an engine with quantization.precision={precision}"
        )

    def set_precision(self, layer: Any, precision: Precision) -> None:
        """Multiply with other blocks of the same codes. ValueError as check_switch."""
        self.check_switch(precision)
        changes_shape = precision.drops_low_product != self.precision.drops_low_product
        self.precision = precision
        if changes_shape:
            self.product = self._new_product()
        self._apply_precision(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.dim() != 2:
            return self.apply(layer, x.reshape(-1, x.shape[-1]), bias).reshape(*x.shape[:-1], -1)
        codes, scale = compat.int8_quantize(x)
        if not self.keeps_activations:
            codes = look_up(codes, layer.activation_values, layer.activation_lowest, self.group)
        if self.precision.drops_low_product:
            codes = torch.cat([codes, -look_up(codes, layer.lower_values, layer.activation_lowest, 1)], dim=1)
        return self.product.multiply(layer, codes, scale, bias, x.dtype)

    def read_back(self, layer: Any) -> tuple[Tensor, Tensor]:
        codes, scale = self.product.read_back(layer)
        return codes[:, : self.shape.columns], scale

    def decoded(self, layer: Any, format: QuantizationFormat, partitions: Sequence[int]) -> list[Tensor]:
        return super().decoded(layer, FORMATS["int8"], partitions)

    def _new_product(self) -> CodeProduct:
        shape = self.shape
        if self.precision.drops_low_product:
            shape = replace(shape, columns=2 * shape.columns)
        if shape.device.type == "cpu":
            return cpu_code_product(shape)
        from qurl.vllm_plugin.cuda import CudaCodes

        return CudaCodes()

    def _apply_precision(self, layer: Any) -> None:
        """Everything that follows from codes and precision."""
        weight = keep(self.codes, weight_table(self.precision))
        if weight is self.codes:
            weight = weight.clone()  # a product may keep it and write later weights into it; the codes of the wire stay
        if self.precision.drops_low_product:
            weight = torch.cat([weight, lower_parts(weight, self.precision.digits)], dim=1)
        self.product.load(layer, {"weight": weight, "weight_scale": self.scale})
        table = activation_table(self.precision)
        self.group = table.group
        self.keeps_activations = table.is_identity and self.shape.device.type == "cpu"  # a graph looks up in any case
        values = functional.pad(table.values, (0, 0, 0, MOST_ROWS - len(table.values)))
        lower = lower_table(self.precision.digits).values
        for name, tensor in (("activation_values", values), ("activation_lowest", table.lowest), ("lower_values", lower)):
            if hasattr(layer, name):
                getattr(layer, name).copy_(tensor)
            else:
                layer.register_buffer(name, tensor.to(self.shape.device, copy=True), persistent=False)


@torch.no_grad()
def set_precision(worker: Any, precision: str | Mapping[str, str] | None) -> float:
    """For collective_rpc: take another `quantization.precision`, whole, as if the engine had been started with it; seconds it took.

    The caller resets the prefix cache, whose keys and values come from the precision before: see switch_precision. Raises
    ValueError, before anything has changed, for what cannot be set."""
    started = time.perf_counter()
    linears = worker.weight_transfer_engine.installer.linears.values()
    layers = [(layer, method, method.kernel) for layer, method in linears if isinstance(method.kernel, AxBxPKernel)]
    if not layers:
        raise ValueError("set_precision needs an engine with quantization=axbxp, and no layer of this one has that format")
    assigned = layers[0][1].config.with_precision(precision)
    assert isinstance(assigned, AxBxP)
    formats = [assigned.of_layers(method.names) for _, method, _ in layers]
    for (_, _, kernel), format in zip(layers, formats, strict=True):
        kernel.check_switch(format.precision)
    for (layer, method, kernel), format in zip(layers, formats, strict=True):
        kernel.set_precision(layer, format.precision)
        method.format = format
    return time.perf_counter() - started


def switch_precision(engine: Any, precision: str | Mapping[str, str] | None) -> float:
    """set_precision on every worker of an LLM or LLMEngine, then an empty prefix cache; seconds of the slowest worker. Requests
    under way are computed anew from their tokens."""
    seconds = max(engine.collective_rpc(set_precision, args=(precision,)))
    engine.reset_prefix_cache(reset_running_requests=True)
    return seconds
