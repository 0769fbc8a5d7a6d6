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


@dataclass(kw_only=True, slots=True)
class Nvfp4Config(QuantizationConfig):
    """E2M1 W4A4: groups of 16 inputs with an E4M3 scale, under a float32 scale per weight and per token."""

    format: str = "nvfp4"


@dataclass(kw_only=True, slots=True)
class Int4Config(QuantizationConfig):
    """W4A16: symmetric weights in groups of 128 inputs."""

    format: str = "int4"


@dataclass(kw_only=True, slots=True)
class Nf4Config(QuantizationConfig):
    """W4A16: quantiles of a normal distribution in groups of 64 inputs."""

    format: str = "nf4"


@dataclass(kw_only=True, slots=True)
class LobcqConfig(QuantizationConfig):
    """LO-BCQ W4A4 (arXiv:2502.05376): 16 codebooks of 6-bit numbers, one for 8 inputs; an E4M3 scale for 64."""

    format: str = "lobcq"


@dataclass(kw_only=True, slots=True)
class LobcqInt8Config(QuantizationConfig):
    """LO-BCQ W4A4 with codebooks of 8-bit numbers, which take no more bits per weight."""

    format: str = "lobcq_int8"


@dataclass(kw_only=True, slots=True)
class LobcqW4a16Config(QuantizationConfig):
    """LO-BCQ for weights only, with the codebooks of lobcq."""

    format: str = "lobcq_w4a16"
