"""What is done when quantized sampling goes wrong."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class GuardAction(Enum):
    """The answer to a limit that is passed."""

    warn = "warn"  # a line in the log
    full_precision = "full_precision"  # the pool samples from unquantized weights until the quantized ones would do again
    raise_precision = "raise_precision"  # of quantization=axbxp: the pool multiplies all blocks, as int8 does, until then
    stop = "stop"  # a checkpoint, then exit code 3

    @property
    def falls_back(self) -> bool:
        """Whether the pool samples otherwise than configured for a while."""
        return self in (GuardAction.full_precision, GuardAction.raise_precision)


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """Limits on what an iteration's rollouts look like, looked at after each update; null: none."""

    action: GuardAction = GuardAction.warn
    max_kl: float | None = None  # of mismatch/kl_rollout_old, nats per token
    max_ratio: float | None = None  # of mismatch/ratio_max
    max_repetition: float | None = None  # of rollout/repetition_fraction
    recovery_steps: int = 5  # so many iterations in a row below recovery_fraction of every limit end a fallback;
    recovery_fraction: float = 0.5  # probe.num_samples of each say what the configured policy would be

    @property
    def has_limit(self) -> bool:
        """Whether it guards anything."""
        return any(limit is not None for limit in (self.max_kl, self.max_ratio, self.max_repetition))
