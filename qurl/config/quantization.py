"""The low-precision copy that samples. One subclass per option of the Hydra group `quantization`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class UpdateAwareness(Enum):
    """How tiny updates are kept visible after quantization."""

    none = "none"
    invariant_scaling = "invariant_scaling"  # QuRL section 3: fold s into norms and the linears behind them, once
    stochastic_rounding = "stochastic_rounding"  # codes rounded at random, so that decoded weights have the right mean


@dataclass(kw_only=True, slots=True)
class QuantizationConfig:
    """Format of the rollout weights and activations."""

    format: str = "none"  # key of qurl.quantization.FORMATS
    ignore: list[str] = field(default_factory=list)  # module names or "re:<regex>" kept in full precision; lm_head always is
    update_awareness: UpdateAwareness = UpdateAwareness.none
    invariant_scale: float = 1.5  # s; only read with update_awareness=invariant_scaling


@dataclass(kw_only=True, slots=True)
class Int8Config(QuantizationConfig):
    """W8A8: symmetric per-channel weights, dynamic per-token activations."""

    format: str = "int8"


@dataclass(kw_only=True, slots=True)
class Fp8Config(QuantizationConfig):
    """E4M3 W8A8: per-channel weights, dynamic per-token activations."""

    format: str = "fp8"


@dataclass(kw_only=True, slots=True)
class Fp8BlockConfig(QuantizationConfig):
    """E4M3 W8A8: 128x128 weight blocks, 1x128 activation groups."""

    format: str = "fp8_block"


@dataclass(kw_only=True, slots=True)
class Mxfp4Config(QuantizationConfig):
    """E2M1 W4A4: groups of 32 inputs with an E8M0 scale, for weights and activations."""

    format: str = "mxfp4"
