"""The probe that says where the mismatch comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class ProbeConfig:
    """Three more forwards over a few samples: mismatch/quantization_kl, engine_kl with its floor, and staleness_kl."""

    every_steps: int = 0  # 0: never
    start_max_kl: float | None = None  # nats between engine and learner at the start; null: what format and dtype explain
    num_samples: int = 16  # of the iteration's; quantized arithmetic is exact rather than fast, on a GPU too
