"""Looks at each iteration's mismatch and repetition, and answers where a limit of `guard` is passed.

Falling back, to full precision or to all blocks of Ax-BxP, needs a way to tell when to return, and what is sampled in a fallback
says nothing of the configured quantization. The probe does: it computes what the policy quantized as configured would make of the
tokens that were sampled. So in a fallback every iteration is probed, and the limits are held against quantization_kl and
quantization_ratio_max in place of kl_rollout_old and ratio_max. Both lack the engine's own part, and the ratio is over fewer
tokens; the distance between a limit and recovery_fraction of it covers that, and keeps the pool from going back and forth."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qurl.config import GuardAction, GuardConfig, QuantizationConfig
from qurl.quantization.axbxp import ALL_BLOCKS

logger = logging.getLogger(__name__)

LESS_NOISE = "lower learner.learning_rate, or keep sensitive layers in full precision with quantization.ignore"
FALLBACKS = {GuardAction.full_precision: "in full precision", GuardAction.raise_precision: "with all blocks"}


def fallback(action: GuardAction, quantization: QuantizationConfig) -> QuantizationConfig | None:
    """What engines run in a fallback; None where the action is none."""
    if action is GuardAction.raise_precision:
        return replace(quantization, precision=str(ALL_BLOCKS))
    return QuantizationConfig() if action is GuardAction.full_precision else None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Limit:
    name: str  # in the guard group
    value: float
    sampled: str  # metric of what was sampled
    would_be: str  # its counterpart for the policy quantized as configured, in a fallback
    advice: str


class Guard:
    """Decides alone; the loop acts. `fallen_back` is how the pool has to sample from the next weight version on."""

    def __init__(self, config: GuardConfig):
        self._config = config
        limits = [
            ("max_kl", config.max_kl, "mismatch/kl_rollout_old", "mismatch/quantization_kl", LESS_NOISE),
            ("max_ratio", config.max_ratio, "mismatch/ratio_max", "mismatch/quantization_ratio_max", LESS_NOISE),
            ("max_repetition", config.max_repetition, *2 * ("rollout/repetition_fraction",),
             f"look at rollouts/; if they loop with quantization=none too, training does it, else {LESS_NOISE}"),
        ]  # fmt: skip
        self._limits = [
            _Limit(name=name, value=value, sampled=sampled, would_be=would_be, advice=advice)
            for name, value, sampled, would_be, advice in limits if value is not None
        ]  # fmt: skip
        self._passed: set[str] = set()  # limits that the iteration before passed, told already
        self._num_clean = 0  # iterations in a row that speak for going back
        self.fallen_back = False

    def judge(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Look at a trained iteration; why the run must stop, None where it goes on.

        A value that is NaN passes every limit. One that is missing passes none: while the critic alone is trained nothing says how
        far old is from rollout."""
        if self.fallen_back:
            self._consider_return(step, metrics)
            return None
        passed = [limit for limit in self._limits if not metrics.get(limit.sampled, 0.0) <= limit.value]
        told = [f"{limit.sampled}={metrics[limit.sampled]:.4g} is above guard.{limit.name}={limit.value:g}" for limit in passed]
        advice = "; ".join(dict.fromkeys(limit.advice for limit in passed))
        before, self._passed = self._passed, {limit.name for limit in passed}
        if not passed:
            return None
        message = f"iteration {step}: {' and '.join(told)}"
        if self._config.action is GuardAction.stop:
            return f"{message}; {advice}, and go on from the checkpoint with a higher limit, or guard.action=full_precision"
        if self._config.action.falls_back:
            logger.warning("%s; the pool samples %s until %d iterations in a row are below %g of every limit", message,
                           FALLBACKS[self._config.action], self._config.recovery_steps, self._config.recovery_fraction)  # fmt: skip
            self.fallen_back, self._num_clean = True, 0
        elif self._passed - before:
            logger.warning("%s; %s", message, advice)
        return None

    def _consider_return(self, step: int, metrics: Mapping[str, float]) -> None:
        fraction = self._config.recovery_fraction
        is_clean = all(metrics[limit.would_be] <= fraction * limit.value for limit in self._limits)
        self._num_clean = self._num_clean + 1 if is_clean else 0
        if self._num_clean >= self._config.recovery_steps:
            logger.warning("iteration %d: %d iterations in a row were below %g of every limit of guard; the pool samples as "
                           "configured again", step, self._num_clean, fraction)  # fmt: skip
            self.fallen_back, self._passed = False, set()

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"fallen_back": self.fallen_back, "num_clean": self._num_clean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on inside a fallback, be it another's, where guard.action still is one."""
        self.fallen_back = state["fallen_back"] and self._config.action.falls_back
        self._num_clean = state["num_clean"]
