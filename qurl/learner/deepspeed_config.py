"""The DeepSpeed JSON: what qurl decides, with learner.deepspeed merged over it."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qurl.config import LearnerConfig, LearnerDtype

OWNED: dict[str, str] = {
    "train_batch_size": "the learner counts tokens, not samples; see learner.max_tokens_per_micro_batch",
    "train_micro_batch_size_per_gpu": "set learner.max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "set learner.num_mini_batches and learner.max_tokens_per_micro_batch",
    "managed_gradient_accumulation": "the learner marks the accumulation boundary itself",
    "gradient_clipping": "set learner.max_grad_norm",
    "optimizer": "set learner.learning_rate, weight_decay, adam_betas, adam_epsilon",
    "scheduler": "set learner.warmup_steps",
    "bf16": "set learner.dtype",
    "bfloat16": "set learner.dtype",
    "fp16": "set learner.dtype; float16 is not supported",
    "zero_optimization.stage": "set learner.zero_stage",
    "prescale_gradients": "the learner undoes DeepSpeed's mean over ranks and relies on it",
    "gradient_predivide_factor": "the learner undoes DeepSpeed's mean over ranks and relies on it",
}
"""DeepSpeed keys that learner.deepspeed may not set, and what does instead."""

OFFLOAD_DEVICES = ("none", "cpu", "nvme")


def deepspeed_config(config: LearnerConfig, num_parameters: int) -> dict[str, Any]:
    """The dict handed to deepspeed.initialize. Raises ValueError where learner.deepspeed sets what qurl controls.

    bfloat16 at stage 0 runs as stage 1: DeepSpeed accumulates gradients in float32 only there, and both compute the same."""
    if config.zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"learner.zero_stage={config.zero_stage} does not exist; use 0, 1, 2 or 3")
    for key, instead in OWNED.items():
        if _contains(config.deepspeed, key):
            raise ValueError(f"learner.deepspeed.{key} conflicts with what the learner controls: {instead}")
    is_bf16 = config.dtype is LearnerDtype.bfloat16
    base: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": max(1, config.zero_stage) if is_bf16 else config.zero_stage,
            "reduce_bucket_size": min(num_parameters, 500_000_000),  # allocated in full, whatever the model
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as fast on offloaded states
        "bf16": {"enabled": is_bf16},
    }
    if is_bf16:
        base["data_types"] = {"grad_accum_dtype": "fp32"}
    merged = _merge(base, config.deepspeed)
    _check_offload(merged["zero_optimization"])
    return merged


def offload_device(zero: Mapping[str, Any], what: str) -> str:
    """Where `what`, offload_optimizer or offload_param of zero_optimization, sends its tensors; "none" leaves them on the GPU."""
    return str((zero.get(what) or {}).get("device") or "none")


def _check_offload(zero: Mapping[str, Any]) -> None:
    """DeepSpeed itself would go on without what a stage cannot offload."""
    for what, stage in (("offload_optimizer", 1), ("offload_param", 3)):
        device = offload_device(zero, what)
        if device not in OFFLOAD_DEVICES:
            key = f"learner.deepspeed.zero_optimization.{what}.device"
            raise ValueError(f"{key}={device} does not exist; use one of {', '.join(OFFLOAD_DEVICES)}")
        if device != "none" and zero["stage"] < stage:
            raise ValueError(f"learner.deepspeed.zero_optimization.{what} needs learner.zero_stage={stage} or more; "
                             f"found {zero['stage']}")  # fmt: skip


@cache
def known_deepspeed_keys() -> frozenset[str]:
    """Every word that DeepSpeed's sources of constants and configurations spell out, its top-level keys among them, read without
    importing it: DeepSpeed itself ignores a key that it does not know. Raises RuntimeError without DeepSpeed."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        raise RuntimeError("DeepSpeed is not installed; `qurl doctor` says which version is needed")
    files = (f for f in Path(spec.origin).parent.rglob("*.py") if f.name in ("constants.py", "config.py"))
    texts = (node.value for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant))
    return frozenset(text for text in texts if isinstance(text, str) and re.fullmatch(r"[a-z][a-z0-9_]*", text))


def _contains(config: dict[str, Any], dotted: str) -> bool:
    head, _, rest = dotted.partition(".")
    return head in config and (not rest or (isinstance(config[head], dict) and _contains(config[head], rest)))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_dicts = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_dicts else value
    return merged
