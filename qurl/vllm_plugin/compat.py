"""Everything of vLLM that is not its public surface; written for 0.32, and 0.26 where that costs nothing."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm import EngineArgs
from vllm import _custom_ops as ops
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.v1.outputs import SamplingMaskLists
from vllm.v1.sample.logits_processor import (
    LOGITSPROCS_GROUP,
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata


def has_weight_transfer_engine(name: str) -> bool:
    """Whether a weight-transfer engine of this name is registered; register_engine raises for a second one."""
    return name in WeightTransferEngineFactory._registry


def full_output_sizes(layer: Any) -> list[int]:
    """Rows of each matrix that vLLM fuses in the layer, over all tensor-parallel ranks; replicated KV heads count once."""
    if isinstance(layer, QKVParallelLinear):
        value_size = getattr(layer, "v_head_size", layer.head_size)
        key_value_sizes = [layer.total_num_kv_heads * layer.head_size, layer.total_num_kv_heads * value_size]
        return [layer.total_num_heads * layer.head_size, *key_value_sizes]
    return list(getattr(layer, "output_sizes", [layer.output_size]))


def shard_index(tensor: Tensor, arguments: tuple[Any, ...]) -> int | None:
    """Which of the fused matrices a weight loader was given, from its positional arguments or (0.32) the tensor; None: all."""
    shard = arguments[0] if arguments else getattr(tensor, "shard_id", None)
    return {"q": 0, "k": 1, "v": 2}[shard] if isinstance(shard, str) else shard


def keep_shard(tensor: Tensor, source: Tensor) -> Tensor:
    """`tensor` with the mark that 0.32's model loaders put on `source`."""
    vars(tensor).update({key: value for key, value in vars(source).items() if key == "shard_id"})
    return tensor


def vllm_parameter_name(model: nn.Module, hf_name: str) -> str | None:
    """Where a Hugging Face tensor ends up in the model; None where the model discards it."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapped = [hf_name] if mapper is None else mapper.apply_list([hf_name])
    return _fused_name(model, mapped[0]) if mapped else None


def _fused_name(model: nn.Module, name: str) -> str:
    """Name of the fused parameter where only the inner model's own mapper knows that one is fused (glm4)."""
    module, _, leaf = name.rpartition(".")
    parent, dot, part = module.rpartition(".")
    for fused, parts in (getattr(model, "packed_modules_mapping", None) or {}).items():
        if part in parts and part != fused and not _has_module(model, module) and _has_module(model, f"{parent}{dot}{fused}"):
            return f"{parent}{dot}{fused}.{leaf}"
    return name


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def stacked_modules(model_config: Any) -> dict[str, list[str]]:
    """Fused module -> its Hugging Face parts in the order of their rows, of a class that says so in its mapper (stablelm)."""
    mapper = getattr(get_model_cls(model_config), "hf_to_vllm_mapper", None)
    found: dict[str, list[str]] = {}
    for part, (fused, _) in getattr(mapper, "orig_to_new_stacked", {}).items():
        found.setdefault(fused.strip("."), []).append(part.strip("."))
    return found


def amx_int8_usable(rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether vLLM's AMX INT8 kernel can run this layer.

    Stricter than vLLM 0.32's own check, which lets through what the kernel cannot do: its tiles have 32 rows (16 raise), and for
    anything but bfloat16 activations it throws inside OpenMP, which ends the process."""
    return (
        torch.cpu._is_amx_tile_supported()
        and hasattr(torch.ops._C, "int8_scaled_mm_with_quant")
        and dtype == torch.bfloat16
        and rows % 32 == 0
        and columns % 32 == 0
    )


def amx_int8_pack(codes: Tensor) -> Tensor:
    """Codes int8 [O, I] in the AMX kernel's layout."""
    return torch.ops._C.convert_weight_packed(codes)


def amx_int8_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, I] bfloat16 -> [T, O]; quantizes x per token. scale: float32 [O, 1]. bias: float32 [O]."""
    return torch.ops._C.int8_scaled_mm_with_quant(x, packed, scale, bias, x.dtype, True)


def onednn_int8_handler(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> ops.CPUDNNLGEMMHandler:
    """Pack codes int8 [O, I] for oneDNN. The handler keeps a raw pointer to `scale`: the caller must keep that tensor alive."""
    return ops.create_onednn_scaled_mm(codes.t(), scale, dtype, True, False, 32)


@cache
def onednn_int8_is_exact() -> bool:
    """Whether oneDNN's INT8 products are right on this CPU.

    Without VNNI instructions they are not, silently: activations are shifted to 0..255, and two neighbouring products are added in
    16 bits, which saturate from 255 * 127 + 255 * 2 on."""
    scale = torch.ones(32, 1, dtype=torch.float32)  # models are loaded under another default dtype
    handler = onednn_int8_handler(torch.full((32, 64), 127, dtype=torch.int8), scale, torch.float32)
    assert handler.handler_tensor is not None
    out = onednn_int8_linear(torch.full((2, 64), 127.0, dtype=torch.float32), handler.handler_tensor, 32, None)
    return bool((out == 64 * 127 * 127).all())


def int8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [T, I] and scales float32 [T, 1] of x [T, I], contiguous."""
    codes = torch.empty_like(x, dtype=torch.int8)
    scale = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    torch.ops._C.dynamic_scaled_int8_quant(codes, x, scale, None)
    return codes, scale


def onednn_int8_linear(x: Tensor, handler_tensor: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    """x [T, I] contiguous -> [T, rows] in x's dtype; quantizes x per token."""
    return onednn_int8_product(*int8_quantize(x), handler_tensor, rows, bias, x.dtype)


def onednn_int8_product(
    codes: Tensor, scale: Tensor, handler_tensor: Tensor, rows: int, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Codes int8 [T, I] and scales float32 [T, 1] -> [T, rows] in `dtype`.

    The calls that vLLM's wrappers make, without their Python: a decode step makes them a hundred times."""
    out = torch.empty((codes.shape[0], rows), dtype=dtype)
    torch.ops._C.onednn_scaled_mm(out, codes, scale, None, None, bias, handler_tensor)
    return out


def cuda_int8_product(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Codes int8 [T, I] and scales float32 [T, 1] -> [T, O] in bfloat16 or float16. weight: int8 [I, O], a transposed view."""
    return ops.cutlass_scaled_mm(codes, weight, scale_a=scale, scale_b=weight_scale, out_dtype=dtype, bias=bias)


def fused_norm_usable(x: Tensor, weight: Tensor) -> bool:
    """Whether vLLM's C++ norm takes x [..., H]: whole vectors of contiguous values, in the dtype of the weight [H]."""
    return x.dtype == weight.dtype and x.is_contiguous() and x.shape[-1] % 16 == 0 and _norm_rounds_to_nearest(x.dtype)


@cache
def _norm_rounds_to_nearest(dtype: torch.dtype) -> bool:
    """Whether the C++ norm rounds as torch does; where there is no AVX512 it cuts bfloat16 off, and every sum loses half a bit."""
    if not hasattr(torch.ops._C, "fused_add_rms_norm"):
        return False
    total = torch.full((1, 16), 0.75 * torch.finfo(dtype).eps, dtype=dtype)
    torch.ops._C.fused_add_rms_norm(torch.ones(1, 16, dtype=dtype), total, torch.ones(16, dtype=dtype), 1e-6)
    return bool((total == 1 + torch.finfo(dtype).eps).all())


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., H] normalized over H and multiplied by weight [H]."""
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """rms_norm(x + residual) and x + residual, in the storage of x and residual."""
    torch.ops._C.fused_add_rms_norm(x, residual, weight, epsilon)
    return x, residual


def has_norm() -> bool:
    """Whether a norm is registered already; register_oot asserts that none is."""
    return "RMSNorm" in op_registry_oot


def is_temperature_sampling(metadata: SamplingMetadata) -> bool:
    """Whether every request of the batch samples from softmax(logits / temperature), at most cut by top-k and top-p, and wants its
    own log-probability at most."""
    changes = (
        not metadata.no_penalties,
        metadata.bad_words_token_ids,
        metadata.allowed_token_ids_mask is not None,
        metadata.logprob_token_ids,
        metadata.max_num_logprobs,
        metadata.thinking_budget_state_holder is not None,
    )
    return metadata.all_random and not any(changes) and all(map(_is_idle, metadata.logitsprocs.all))


def _is_idle(processor: object) -> bool:
    """Whether the logits processor is one of vLLM's own and no request uses it."""
    active: dict[type, str] = {
        MinPLogitsProcessor: "min_p_count", LogitBiasLogitsProcessor: "biases", MinTokensLogitsProcessor: "min_toks",
    }  # fmt: skip
    return type(processor) in active and not getattr(processor, active[type(processor)])


def num_known_tokens(runner: Any) -> np.ndarray:
    """Tokens of each request in the batch of a model runner, prompt included: the position of the one sampled next."""
    return runner.input_batch.num_tokens_no_spec


def logits_processor_plugins() -> list[str]:
    """Names of installed packages' logits processors, which vLLM loads into every engine without being asked."""
    return [point.value for point in entry_points(group=LOGITSPROCS_GROUP)]


def reports_kept_tokens() -> bool:
    """Whether this vLLM can say from which tokens each one was drawn; 0.32 can, 0.26 cannot."""
    return hasattr(EngineArgs, "return_sampling_mask")


def report_kept_tokens(engine: Any) -> None:
    """Let the scheduler of an in-process LLMEngine hand out the sampling masks of QurlCpuWorker.

    vLLM 0.32 has an argument for it, return_sampling_mask, and refuses it with the model runner of CPUs, whose sampler makes no
    masks; ours does. Not needed once vLLM's second model runner runs on CPUs (`tests/e2e` fails where masks do not arrive)."""
    engine.engine_core.engine_core.scheduler.return_sampling_mask = True


def keep_sampling_masks_as_arrays() -> None:
    """Let vLLM hand out sampling masks as numpy arrays, where it would make a Python number of each entry.

    A set may have thousands of entries, and a response thousands of sets: 36 bytes an entry instead of 4, for as long as the
    response takes to finish. Affects 0.32; everything works without it, only slower."""
    SamplingMaskLists.to_nested_list = _split_mask  # type: ignore[method-assign,assignment]


def _split_mask(mask: SamplingMaskLists) -> list[np.ndarray]:
    return [mask.token_ids] if mask.offsets is None else np.split(mask.token_ids, mask.offsets[1:-1])
