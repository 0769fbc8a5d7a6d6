"""What k samples per problem say about a policy: avg@k, pass@k, maj@k and their confidence intervals.

Everything counts right answers, not rewards: a sample is right where its reward is positive, so rewards in {0, 1} and in {-1, 1}
give the same figures. A sample without a reward (its verifier hung or died) is wrong here; how many there are is reported beside.

Samples of one problem are not independent, so intervals come from a bootstrap over problems: whole problems are drawn with
replacement, with all their samples."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over problems with its confidence interval."""

    value: float
    low: float
    high: float


def is_right(reward: float | None) -> bool:
    """Whether a sample counts as right; None is the reward of a sample whose verifier failed."""
    return reward is not None and reward > 0


def avg_at_k(right: Sequence[bool]) -> float:
    """Fraction of a problem's samples that are right; at least one sample."""
    return fmean(right)


def pass_at_k(right: Sequence[bool], k: int) -> float:
    """Probability that k of a problem's n samples, drawn without replacement, hold a right one: 1 - C(n - c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv:2107.03374) eq. 1; c of n samples are right. ValueError unless 1 <= k <= n."""
    num_samples, num_wrong = len(right), len(right) - sum(right)
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} cannot be estimated from {num_samples} samples")
    return 1.0 - math.comb(num_wrong, k) / math.comb(num_samples, k)


def maj_at_k(right: Sequence[bool], votes: Sequence[str | None]) -> float:
    """Whether the answer most samples of a problem give is right: 0 or 1, or between them where answers tie.

    votes: a sample's answer in normal form, None where it gives none and does not vote. Tied answers share, as if one of them were
    drawn; so do the samples of the winning answer, of which one may lack its reward. 0 where nobody votes."""
    ballots: dict[str, list[bool]] = defaultdict(list)
    for is_correct, vote in zip(right, votes, strict=True):
        if vote is not None:
            ballots[vote].append(is_correct)
    most = max(map(len, ballots.values()), default=0)
    return fmean(fmean(ballot) for ballot in ballots.values() if len(ballot) == most) if ballots else 0.0


def estimate(values: Sequence[float], seed: int) -> Estimate:
    """Mean of one value in [0, 1] per problem, and its percentile bootstrap interval over problems, at CONFIDENCE.

    Where all problems have the value 0 or all have 1, resampling would show no spread; the bound beyond which so many equal values
    have a probability below (1 - CONFIDENCE) / 2 stands in for it. The same values and seed give the same interval."""
    num_problems, tail = len(values), (1 - CONFIDENCE) / 2
    value = fmean(values)
    if value in (0.0, 1.0):
        spread = 1 - tail ** (1 / num_problems)
        return Estimate(value=value, low=max(0.0, value - spread), high=min(1.0, value + spread))
    generator = random.Random(seed)
    means = sorted(fmean(generator.choices(values, k=num_problems)) for _ in range(NUM_RESAMPLES))
    return Estimate(value=value, low=percentile(means, tail), high=percentile(means, 1 - tail))


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """Between the two neighbors of position fraction * (n - 1) of sorted numbers, linearly."""
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
