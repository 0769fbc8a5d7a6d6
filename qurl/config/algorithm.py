"""The objective: advantages, correction of the rollout mismatch, policy loss, KL, entropy."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Aggregation(Enum):
    """How per-token losses become one number."""

    token_mean = "token_mean"  # over all tokens of the mini-batch (DAPO)
    sequence_mean = "sequence_mean"  # over tokens of a response, then over responses (GRPO as published, GSPO)
    constant = "constant"  # summed over a response, divided by aggregation_constant, then mean over responses (Dr. GRPO)


class KLEstimator(Enum):
    """Schulman's estimators of KL(current || reference)."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class KLPlacement(Enum):
    """Where the KL term goes."""

    loss = "loss"  # verl's use_kl_loss
    reward = "reward"  # taken off a response's reward before advantages, with gae off each token's; verl's use_kl_in_reward


class Rejection(Enum):
    """Which tokens a correction leaves out of the loss, by rho = pi_old / pi_rollout; verl's rollout_rs."""

    none = "none"
    token = "token"  # a token whose rho is out of bounds
    sequence = "sequence"  # all of a response whose product of rho is
    geometric = "geometric"  # ... whose geometric mean of rho is
    k3 = "k3"  # ... whose mean of rho - 1 - log rho is


REJECTION_BOUNDS = {
    Rejection.none: (0.0, float("inf")),
    Rejection.token: (0.5, 5.0),
    Rejection.sequence: (0.0, 2.0),
    Rejection.geometric: (0.999, 1.001),
    Rejection.k3: (0.0, 0.01),
}
"""(rejection_low, rejection_high) where they are null."""


GAE = "gae"
"""The advantage that needs a critic."""


@dataclass(kw_only=True, slots=True)
class AdvantageConfig:
    """What a rollout is worth among those of the iteration."""

    name: str = "grpo"  # key of qurl.algorithms.ADVANTAGES or package.module:attribute
    discount: float = 1.0  # of gae, per token; verl's gamma
    gae_lambda: float = 1.0  # of gae: 1 trusts the outcome, 0 the critic; verl's lam


@dataclass(kw_only=True, slots=True)
class CorrectionConfig:
    """What is done about pi_rollout != pi_old."""

    name: str = "acr"  # key of qurl.algorithms.CORRECTIONS or package.module:attribute
    truncation: float = 2.0  # C of TIS, sequence TIS and ACR
    max_clip_scale: float = 10.0  # safety cap on ACR's widening max(1, rho/C); the paper has none
    rejection: Rejection = Rejection.none
    rejection_low: float | None = None  # null: REJECTION_BOUNDS
    rejection_high: float | None = None
    normalize_weights: bool = False  # divide weights by their mean over the mini-batch; computes old logprobs beforehand

    @property
    def rejection_bounds(self) -> tuple[float, float]:
        """Smallest and largest value that is kept."""
        low, high = REJECTION_BOUNDS[self.rejection]
        return (
            low if self.rejection_low is None else self.rejection_low,
            high if self.rejection_high is None else self.rejection_high,
        )


@dataclass(kw_only=True, slots=True)
class PolicyLossConfig:
    """Clipped surrogate."""

    name: str = "ppo_clip"  # key of qurl.algorithms.POLICY_LOSSES or package.module:attribute
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # bound on the ratio for A < 0 (verl's clip_ratio_c), > 1
    aggregation: Aggregation = Aggregation.token_mean
    aggregation_constant: int | None = None  # tokens; with aggregation=constant, e.g. ${rollout.max_response_tokens}


@dataclass(kw_only=True, slots=True)
class KLConfig:
    """KL to the frozen reference policy."""

    coefficient: float = 0.0  # 0: no reference model is loaded
    estimator: KLEstimator = KLEstimator.k3
    placement: KLPlacement = KLPlacement.loss


@dataclass(kw_only=True, slots=True)
class OverlongConfig:
    """What is done about responses that come near rollout.max_response_tokens (DAPO, arXiv:2503.14476 section 3.4)."""

    penalty_tokens: int = 0  # soft punishment over the last so many tokens; 0: none. verl's overlong_buffer.len
    penalty: float = 1.0  # what is subtracted from the reward at full length; verl's overlong_buffer.penalty_factor
    filter: bool = False  # truncated responses are left out of the loss; they stay in the statistics of their group


@dataclass(kw_only=True, slots=True)
class DynamicSamplingConfig:
    """Prompts whose rollouts all earn the same are replaced by others before training (DAPO, arXiv:2503.14476 section 3.2)."""

    enabled: bool = False  # verl's filter_groups.enable
    num_prompts_per_generation: int | None = None  # sampled at a time; null: rollout.num_prompts_per_step. verl's gen_batch_size
    max_generations: int = 10  # per iteration; then what was found is trained. verl's filter_groups.max_num_gen_batches


@dataclass(kw_only=True, slots=True)
class AlgorithmConfig:
    """GRPO with a correction for quantized rollouts."""

    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    entropy_coefficient: float = 0.0  # times the entropy, subtracted from the loss; > 0 rewards spread-out distributions

    @property
    def uses_critic(self) -> bool:
        """Advantages come from a critic that the learner trains, as TrainConfig.critic says."""
        return self.advantage.name == GAE
