"""GPU kernels: vLLM's own W8A8 choices, given weights in the form they expect.

vLLM's kernels keep their weights in the layer's parameters, so the linear method can move later weights into the storage that CUDA
graphs captured. A kernel object is made once per layer and asked to process again after each update; it always gets unpadded
tensors, since it derives the logical width from what it sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import init_fp8_linear_kernel, init_int8_linear_kernel
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    create_fp8_quant_key,
    kFp8Dynamic128Sym,
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
)

from qurl.quantization.base import QuantizationFormat
from qurl.quantization.fp8_block import BLOCK
from qurl.vllm_plugin import compat
from qurl.vllm_plugin.kernels import CodeKernel, CodeProduct, LayerShape, as_parameter


def select_cuda_kernel(format: QuantizationFormat, layer: Any, shape: LayerShape) -> CodeKernel:
    """vLLM's kernel for this GPU; needs a current vLLM config. Raises ValueError where it cannot run the format as W8A8."""
    for name in ("input_scale", "input_zero_point", "azp_adj", "input_scale_ub"):
        layer.register_parameter(name, None)  # vLLM's kernels ask for all of them
    if format.name == "int8":
        kernel = init_int8_linear_kernel(
            is_channelwise=True, is_static_input_scheme=False, input_symmetric=True, module_name="QurlLinearMethod"
        )
        return CudaChannelwise(kernel, transposed_by_kernel=True)
    if format.name == "fp8":
        kernel = _fp8_kernel(shape, kFp8DynamicTokenSym, kFp8StaticChannelSym)
        return CudaChannelwise(kernel, transposed_by_kernel=False)
    if format.name == "fp8_block":
        if any(rows % BLOCK for rows in shape.partitions[:-1]):
            raise ValueError(
                f"fp8_block cannot fuse matrices of {list(shape.partitions)} rows: all but the last need a multiple of {BLOCK}; "
                "add the layer to quantization.ignore or use quantization.format=fp8"
            )
        layer.weight_block_size = [BLOCK, BLOCK]
        weight_key = create_fp8_quant_key(static=True, group_shape=GroupShape(BLOCK, BLOCK))
        return CudaBlockwise(_fp8_kernel(shape, kFp8Dynamic128Sym, weight_key), shape)
    raise ValueError(f"quantization.format={format.name} has no GPU kernel; use int8, fp8 or fp8_block")


def _fp8_kernel(shape: LayerShape, activation_key: Any, weight_key: Any) -> Any:
    kernel = init_fp8_linear_kernel(
        activation_quant_key=activation_key,
        weight_quant_key=weight_key,
        input_dtype=shape.dtype,
        out_dtype=shape.dtype,
        weight_shape=(shape.rows, shape.columns),
        module_name="QurlLinearMethod",
    )
    if "Marlin" in type(kernel).__name__:
        raise ValueError(
            f"this GPU has no FP8 arithmetic: vLLM offers {type(kernel).__name__}, which leaves activations in full precision; "
            "use quantization.format=int8"
        )
    if _requantizes(kernel):
        raise ValueError(
            f"vLLM's {type(kernel).__name__} rounds the scales of fp8_block to powers of two, so that the engine would not hold "
            "the weights that were sent; start the process with VLLM_USE_DEEP_GEMM=0"
        )
    return kernel


def _requantizes(kernel: Any) -> bool:
    """Whether a block kernel encodes weights anew as it loads them. DeepGEMM does for scales in E8M0, also as a fallback."""
    return any(getattr(part, "use_deep_gemm_e8m0", False) for part in (kernel, getattr(kernel, "fallback", None)))


class CudaChannelwise(CodeKernel):
    """INT8 and FP8 with one scale per row. Codes lie as [I, O], a transposed view; the kernel may pad them."""

    def __init__(self, kernel: Any, *, transposed_by_kernel: bool) -> None:
        self.kernel = kernel
        self.transposed_by_kernel = transposed_by_kernel
        self.code_shape = torch.Size()

    def load(self, layer: Any, rows: Mapping[str, Tensor]) -> None:
        codes, scale = rows["weight"], rows["weight_scale"]
        self.code_shape = codes.shape
        layer.register_parameter("weight", as_parameter(codes if self.transposed_by_kernel else codes.t()))
        layer.register_parameter("weight_scale", as_parameter(scale))
        self.kernel.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.kernel.apply_weights(layer, x, bias)

    def read_back(self, layer: Any) -> tuple[Tensor, Tensor]:
        rows, columns = self.code_shape
        return layer.weight.data.t()[:rows, :columns], layer.weight_scale.data.reshape(-1, 1)[:rows]


class CudaCodes(CodeProduct):
    """INT8 codes times INT8 codes, CUTLASS through vLLM. Codes lie as [I, O], a transposed view of [O, I]."""

    def load(self, layer: Any, rows: Mapping[str, Tensor]) -> None:
        for name, tensor in (("weight", rows["weight"].t()), ("weight_scale", rows["weight_scale"])):
            held = getattr(layer, name, None)
            if held is None:
                layer.register_parameter(name, as_parameter(tensor))
            else:
                held.data.copy_(tensor)

    def multiply(self, layer: Any, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return compat.cuda_int8_product(codes, scale, layer.weight, layer.weight_scale, bias, dtype)

    def read_back(self, layer: Any) -> tuple[Tensor, Tensor]:
        return layer.weight.data.t(), layer.weight_scale.data


class CudaBlockwise(CodeKernel):
    """FP8 in 128x128 blocks. Codes lie as [O, I], scales as [blocks, blocks]."""

    def __init__(self, kernel: Any, shape: LayerShape) -> None:
        self.kernel = kernel
        self.shape = shape

    def load(self, layer: Any, rows: Mapping[str, Tensor]) -> None:
        block_scale = torch.cat([part[::BLOCK] for part in rows["weight_scale"].split(self.shape.partitions)])
        layer.register_parameter("weight", as_parameter(rows["weight"]))
        layer.register_parameter("weight_scale_inv", as_parameter(block_scale))
        self.kernel.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.kernel.apply_weights(layer, x, bias)

    def read_back(self, layer: Any) -> tuple[Tensor, Tensor]:
        """Raises RuntimeError where the kernel has laid the scales out in another shape."""
        held = layer.weight_scale_inv.data
        counts = [-(-rows // BLOCK) for rows in self.shape.partitions]
        if held.dtype != torch.float32 or held.shape != (sum(counts), -(-self.shape.columns // BLOCK)):
            raise RuntimeError(
                f"{type(self.kernel).__name__} keeps scales as {held.dtype} {list(held.shape)}, which cannot be read back; "
                "start the process with VLLM_USE_DEEP_GEMM=0"
            )
        parts = zip(held.split(counts), self.shape.partitions, strict=True)
        scale = torch.cat([part.repeat_interleave(BLOCK, dim=0)[:rows] for part, rows in parts])
        return layer.weight.data[: self.shape.rows, : self.shape.columns], scale
