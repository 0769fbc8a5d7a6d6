"""The objective: advantages, correction of the rollout mismatch, policy loss, KL."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Aggregation(Enum):
    """How per-token losses become one number."""

    token_mean = "token_mean"  # over all tokens of the mini-batch (DAPO)
    sequence_mean = "sequence_mean"  # over tokens of a response, then over responses (GRPO as published)


class KLEstimator(Enum):
    """Schulman's estimators of KL(current || reference)."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


@dataclass(kw_only=True, slots=True)
class AdvantageConfig:
    """Group-relative advantages."""

    name: str = "grpo"  # key of qurl.algorithms.ADVANTAGES or package.module:attribute
    normalize_std: bool = True  # divide by the group's standard deviation


@dataclass(kw_only=True, slots=True)
class CorrectionConfig:
    """What is done about pi_rollout != pi_old."""

    name: str = "acr"  # key of qurl.algorithms.CORRECTIONS (naive, none, decoupled, tis, acr) or package.module:attribute
    truncation: float = 2.0  # C of TIS and ACR
    max_clip_scale: float = 10.0  # safety cap on ACR's widening max(1, rho/C); the paper has none


@dataclass(kw_only=True, slots=True)
class PolicyLossConfig:
    """Clipped surrogate."""

    name: str = "ppo_clip"  # key of qurl.algorithms.POLICY_LOSSES or package.module:attribute
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # bound on the ratio for A < 0 (verl's clip_ratio_c), > 1
    aggregation: Aggregation = Aggregation.token_mean


@dataclass(kw_only=True, slots=True)
class KLConfig:
    """KL to the frozen reference policy, added to the loss."""

    coefficient: float = 0.0  # 0: no reference model is loaded
    estimator: KLEstimator = KLEstimator.k3


@dataclass(kw_only=True, slots=True)
class AlgorithmConfig:
    """GRPO with a correction for quantized rollouts."""

    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    kl: KLConfig = field(default_factory=KLConfig)
