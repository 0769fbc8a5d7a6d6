"""DeepSpeed training."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class LearnerDtype(Enum):
    """dtype of forward and backward; master weights are float32 either way."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(kw_only=True, slots=True)
class LearnerConfig:
    """Optimizer, parallelism and batching."""

    num_ranks: int = 1
    zero_stage: int = 0  # 0..3
    dtype: LearnerDtype = LearnerDtype.float32
    learning_rate: float = 1e-6
    scaled_layers_multiplier: float = 1.0  # times learning_rate for q, k, v, gate, up: what invariant scaling does to Adam's steps
    weight_decay: float = 0.0
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    adam_epsilon: float = 1e-8
    warmup_steps: int = 0  # optimizer steps, linear
    max_grad_norm: float = 1.0
    num_mini_batches: int = 1  # optimizer steps per iteration
    max_tokens_per_micro_batch: int = 8192
    activation_checkpointing: bool = False
    deepspeed: dict[str, Any] = field(default_factory=dict)  # merged over the generated DeepSpeed JSON
