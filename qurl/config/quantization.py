"""The low-precision copy that samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from qurl.config.codebooks_file import resolved_codebooks
from qurl.config.precision_file import resolved_precision


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
    precision: Any = None
    """Of format=axbxp: a setting such as k2-w2g16-a3g1, or a mapping of module names or "re:<regex>" to settings, of which the
    first that matches a layer counts; or the path of a YAML or JSON file with such a mapping, which takes its place. null: the
    format's own."""
    codebooks: Any = None
    """Of the formats of LO-BCQ: a file of codebooks with their layout, whose content takes the place of its path. null: those of
    the package."""
    rotation: int = 0
    """Of the formats whose scales belong to groups of inputs: inputs of a block that a Hadamard matrix mixes in weights and
    activations before they are encoded, 16, 32, 64 or 128. 0: none."""
    group_size: int = 0
    """Of format=int4 and nf4: inputs that share a scale, a multiple of 8 that divides those of every layer. 0: the format's own,
    128 and 64."""
    update_awareness: UpdateAwareness = UpdateAwareness.none
    invariant_scale: float = 1.5  # s; only read with update_awareness=invariant_scaling

    def __post_init__(self) -> None:
        self.codebooks = resolved_codebooks(self.codebooks)
        self.precision = resolved_precision(self.precision)
