"""Advantages from the rewards of one group: one scalar per rollout, broadcast over its tokens by the packer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from qurl.config.algorithm import AdvantageConfig

STD_EPSILON = 1e-6  # as in verl; keeps a group with nearly equal rewards finite


def grpo(rewards: Sequence[float], lengths: Sequence[int], config: AdvantageConfig) -> list[float]:
    """Group-relative advantages (r - mean) / (std + 1e-6), or r - mean without `normalize_std`.

    rewards: one finite number per rollout of the group. lengths: response tokens per rollout; not used here, other estimators
    need them. A group of one and a group of equal rewards say nothing about the policy and give exact zeros. The standard
    deviation is the unbiased one (divisor G - 1), as torch.std in verl and TRL; the paper does not say which. Raises ValueError
    for a non-finite reward or unequal lengths of the arguments. Shao et al. 2024 (arXiv:2402.03300) section 4.1.2."""
    if len(rewards) != len(lengths):
        raise ValueError(f"{len(rewards)} rewards but {len(lengths)} response lengths; a group has one of each per rollout")
    if not all(math.isfinite(r) for r in rewards):
        raise ValueError(f"rewards {list(rewards)} are not all finite; drop failed rollouts before computing advantages")
    if len(set(rewards)) < 2:
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    centered = [r - mean for r in rewards]
    if not config.normalize_std:
        return centered
    std = math.sqrt(math.fsum(c * c for c in centered) / (len(rewards) - 1))
    return [c / (std + STD_EPSILON) for c in centered]


AdvantageFn = Callable[[Sequence[float], Sequence[int], AdvantageConfig], list[float]]

ADVANTAGES: dict[str, AdvantageFn] = {"grpo": grpo}
