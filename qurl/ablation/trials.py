"""What is compared: arms, and the runs they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from qurl.errors import ConfigError

FULL_PRECISION = "none"
"""Format of the arm that everything else is measured against."""

BASELINE = "bf16"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to train, as a difference to the recipe."""

    what: str
    overrides: tuple[str, ...]


def _correction(name: str) -> str:
    return f"algorithm.correction.name={name}"


ARMS = {
    BASELINE: Arm(what="rollouts in bfloat16, no correction", overrides=(_correction("none"),)),
    "naive": Arm(what="the quantized policy as denominator of the ratio; QuRL eq. 3", overrides=(_correction("naive"),)),
    "none": Arm(what="no correction; eq. 1", overrides=(_correction("none"),)),
    "decoupled": Arm(what="importance weights without truncation; eq. 4", overrides=(_correction("decoupled"),)),
    "tis": Arm(what="truncated importance weights; eq. 5", overrides=(_correction("tis"),)),
    "acr": Arm(what="TIS with adaptive clipping range; eq. 9", overrides=(_correction("acr"),)),
    "acr_scaling": Arm(
        what="ACR and invariant scaling, s = 1.5",
        overrides=(_correction("acr"), "quantization.update_awareness=invariant_scaling", "quantization.invariant_scale=1.5"),
    ),
    "acr_lr": Arm(
        what="ACR and 1.5 times the learning rate on the layers that scaling touches; its control",
        overrides=(_correction("acr"), "learner.scaled_layers_multiplier=1.5"),
    ),
    "acr_rounding": Arm(
        what="ACR and stochastic rounding",
        overrides=(_correction("acr"), "quantization.update_awareness=stochastic_rounding"),
    ),
}
"""Arms by name, in the order of tables."""

COMPARISONS = (
    ("naive", "none"), ("none", BASELINE), ("decoupled", "none"), ("tis", "none"), ("tis", BASELINE), ("acr", "tis"),
    ("acr", BASELINE), ("acr_scaling", "acr"), ("acr_scaling", "acr_lr"), ("acr_lr", "acr"), ("acr_rounding", "acr"),
)  # fmt: skip
"""(arm, other arm) whose difference answers a question."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One run."""

    arm: str
    format: str
    seed: int

    @property
    def run_name(self) -> str:
        """Its folder; the baseline has no format."""
        return f"{self.arm}_{self.seed}" if self.arm == BASELINE else f"{self.format}_{self.arm}_{self.seed}"

    def overrides(self, output_dir: str) -> list[str]:
        """What turns the recipe into this trial."""
        return [
            f"quantization={self.format}", *ARMS[self.arm].overrides, f"seed={self.seed}", f"run_name={self.run_name}",
            f"output_dir='{output_dir}'",
        ]  # fmt: skip


def plan_trials(arms: Sequence[str], formats: Sequence[str], seeds: Sequence[int]) -> list[Trial]:
    """Every arm on every format and seed, all of a seed first; the baseline once per seed.

    Raises ConfigError for an unknown arm, full precision among the formats, or something named twice."""
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ConfigError(f"--arms {unknown[0]}: no such arm; use some of {', '.join(ARMS)}")
    if FULL_PRECISION in formats:
        raise ConfigError(f"--formats {FULL_PRECISION}: full precision is the arm {BASELINE}; give quantized formats")
    for option, values in (("--arms", arms), ("--formats", formats), ("--seeds", seeds)):
        if len(set(values)) != len(values):
            raise ConfigError(f"{option} {' '.join(map(str, values))}: something is named twice")
    pairs = [(FULL_PRECISION, BASELINE)] if BASELINE in arms else []
    pairs += list(product(formats, (arm for arm in ARMS if arm in arms and arm != BASELINE)))
    return [Trial(arm=arm, format=name, seed=seed) for seed in seeds for name, arm in pairs]
