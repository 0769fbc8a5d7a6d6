"""Advantages from the rewards of an iteration: one scalar per rollout, broadcast over its tokens by the packer.

An estimator sees every group of the iteration at once, since some normalize over all of them; the result does not depend on the
order of groups, on mini-batches or on ranks. Sums are exact (math.fsum), so that equal rewards give exact zeros.

    grpo                          (r - mean) / (std + 1e-6)              mean and std of the group
    dr_grpo                       r - mean                               no division: it favors groups that are easy or hard
    rloo                          r - mean of the group's other rewards
    reinforce_plus_plus           whiten(r)                              over all tokens of the iteration
    reinforce_plus_plus_baseline  whiten(r - mean)                       mean of the group, then over all tokens
    gae                           r                                      the learner puts those of its critic in their place

With `algorithm.kl.placement=reward` r is the reward less the KL penalty summed over the whole response."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qurl.config.algorithm import GAE, AdvantageConfig

STD_EPSILON = 1e-6  # as in verl; keeps a group with nearly equal rewards finite
VARIANCE_EPSILON = 1e-8  # likewise, verl's masked_whiten


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardedGroup:
    """The rollouts of one prompt whose reward is known; may be empty. Raises ValueError for a reward that is not finite."""

    rewards: Sequence[float]
    lengths: Sequence[int]  # trained tokens per rollout

    def __post_init__(self) -> None:
        if len(self.rewards) != len(self.lengths):
            raise ValueError(f"{len(self.rewards)} rewards but {len(self.lengths)} lengths; a group has one of each per rollout")
        if not all(math.isfinite(r) for r in self.rewards):
            raise ValueError(f"rewards {list(self.rewards)} are not all finite; drop failed rollouts before computing advantages")


def grpo(groups: Sequence[RewardedGroup], config: AdvantageConfig) -> list[list[float]]:
    """(r - mean) / (std + 1e-6) within each group. A group of one and a group of equal rewards give exact zeros.

    The standard deviation is the unbiased one (divisor G - 1), as torch.std in verl and TRL; the paper does not say which.
    Shao et al. 2024 (arXiv:2402.03300) section 4.1.2."""
    return [_over_std(_centered(group)) for group in groups]


def dr_grpo(groups: Sequence[RewardedGroup], config: AdvantageConfig) -> list[list[float]]:
    """r - mean within each group, nothing divided; a group of one gives zero.

    Liu et al. 2025 (arXiv:2503.20783) section 3.2; verl's norm_adv_by_std_in_grpo=False. Its other half, a loss that does not
    divide by the response's length, is algorithm.policy_loss.aggregation=constant."""
    return [_centered(group) for group in groups]


def rloo(groups: Sequence[RewardedGroup], config: AdvantageConfig) -> list[list[float]]:
    """r less the mean of the group's other rewards, i.e. (r - mean) G / (G - 1); a group of one has no others and gives zero.

    Ahmadian et al. 2024 (arXiv:2402.14740) section 2.3; Kool et al. 2019."""
    return [[c * len(group.rewards) / max(1, len(group.rewards) - 1) for c in _centered(group)] for group in groups]


def reinforce_plus_plus(groups: Sequence[RewardedGroup], config: AdvantageConfig) -> list[list[float]]:
    """r whitened over all tokens of the iteration; the groups do not matter.

    Hu et al. 2025 (arXiv:2501.03262) with discount 1. There a token pays the KL penalty of the tokens from it on; here, where
    penalties are placed in the reward, that of the whole response: the same gradient in expectation, with more variance."""
    return _whitened([list(group.rewards) for group in groups], groups)


def reinforce_plus_plus_baseline(groups: Sequence[RewardedGroup], config: AdvantageConfig) -> list[list[float]]:
    """r - mean of its group, then whitened over all tokens of the iteration; Hu et al. 2025 (arXiv:2501.03262)."""
    return _whitened([_centered(group) for group in groups], groups)


def outcome(groups: Sequence[RewardedGroup], config: AdvantageConfig) -> list[list[float]]:
    """r itself: generalized advantages of a critic that says 0 of every state, before whitening. The learner has a better one and
    replaces them token by token (qurl.algorithms.gae)."""
    return [list(group.rewards) for group in groups]


def _centered(group: RewardedGroup) -> list[float]:
    rewards = group.rewards
    if len(set(rewards)) < 2:
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    return [r - mean for r in rewards]


def _over_std(centered: list[float]) -> list[float]:
    if not any(centered):
        return centered
    std = math.sqrt(math.fsum(c * c for c in centered) / (len(centered) - 1))
    return [c / (std + STD_EPSILON) for c in centered]


def _whitened(values: list[list[float]], groups: Sequence[RewardedGroup]) -> list[list[float]]:
    """Mean 0 and variance 1 over the tokens that carry the values, as verl's masked_whiten; zeros where all values are equal."""
    weighted = [(v, n) for vs, group in zip(values, groups, strict=True) for v, n in zip(vs, group.lengths, strict=True) if n]
    if len({v for v, _ in weighted}) < 2:
        return [[0.0] * len(vs) for vs in values]
    num_tokens = sum(n for _, n in weighted)
    mean = math.fsum(n * v for v, n in weighted) / num_tokens
    variance = math.fsum(n * (v - mean) ** 2 for v, n in weighted) / (num_tokens - 1)
    return [[(v - mean) / math.sqrt(variance + VARIANCE_EPSILON) for v in vs] for vs in values]


AdvantageFn = Callable[[Sequence[RewardedGroup], AdvantageConfig], list[list[float]]]

ADVANTAGES: dict[str, AdvantageFn] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    GAE: outcome,
}
