"""What the runs of an ablation say, as numbers and as sentences.

Seeds are few, so nothing is claimed by eye: two arms differ where the 95 % confidence interval of their mean difference, paired by
seed (Student's t), leaves out zero; everything else is not resolved."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qurl.ablation.outcomes import Outcome
from qurl.ablation.trials import ARMS, BASELINE, COMPARISONS, FULL_PRECISION, Trial
from qurl.observability.run_data import RunData

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""0.975 quantiles of Student's t for 1, 2, ... degrees of freedom."""

COLUMNS = (
    "arm", "held-out, full precision, %", "seeds", "held-out, rollouts' precision, %", "collapsed",
    "training accuracy, last tenth, %", "KL(rollout || old), last tenth", "largest ratio", "tokens with ratio > C, %",
    "ACR changed, % of tokens", "ACR changed, % of gradient",
)  # fmt: skip

LAST_FRACTION = 0.1  # of the iterations, that "final" averages over
COLLAPSED = 0.5  # of its best, below which the final training accuracy counts as collapse


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One run, read back."""

    trial: Trial
    outcome: Outcome
    run: RunData

    @property
    def accuracy(self) -> float | None:
        """Held-out, full precision, mean over datasets; None where a guard stopped the run before any checkpoint."""
        return statistics.fmean(self.outcome.accuracy.values()) if self.outcome.accuracy else None

    @property
    def rollout_accuracy(self) -> float | None:
        """The same in the rollouts' own precision, by the run's last evaluation; None where a guard stopped the run before it."""
        if self.outcome.stopped is not None or not self.run.evaluations:
            return None
        found = [value for key, value in self.run.evaluations[-1].items() if key.endswith("/avg_at_k")]
        return statistics.fmean(found) if found else None

    def final(self, key: str) -> float | None:
        """Mean of a metric over the last tenth of the iterations."""
        return self.run.mean(key, max(1, round(LAST_FRACTION * len(self.run.metrics))))

    @property
    def collapsed(self) -> bool:
        """The final training accuracy is below half of the best of any tenth of the run; or a guard stopped it."""
        values = self.run.series("accuracy/train")[1]
        width = max(1, round(LAST_FRACTION * len(values)))
        best = max(statistics.fmean(values[i : i + width]) for i in range(max(1, len(values) - width + 1)))
        return self.outcome.stopped is not None or statistics.fmean(values[-width:]) < COLLAPSED * best


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A measure of `arm` minus that of `other`, paired by seed; in points of a percent."""

    format: str
    arm: str
    other: str
    mean: float
    half_width: float  # of the 95 % interval; infinite with one seed
    num_seeds: int

    @property
    def resolved(self) -> bool:
        """The interval leaves out zero."""
        return abs(self.mean) > self.half_width

    def sentence(self) -> str:
        """For the page."""
        interval = (
            f"{self.mean:+.1f} ± {self.half_width:.1f} points" if math.isfinite(self.half_width) else f"{self.mean:+.1f} points"
        )
        if self.resolved:
            verdict = "better" if self.mean > 0 else "worse"
            return f"{self.format}: {self.arm} is {verdict} than {self.other} ({interval})."
        return f"{self.format}: {self.arm} against {self.other} is not resolved by {self.num_seeds} seeds ({interval})."


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds; 0 for one seed."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def select(results: Sequence[Result], arm: str, format: str) -> list[Result]:
    """The runs of an arm, by seed; the baseline belongs to every format."""
    name = FULL_PRECISION if arm == BASELINE else format
    return [result for result in results if (result.trial.arm, result.trial.format) == (arm, name)]


def differences(results: Sequence[Result], formats: Sequence[str], measure: Callable[[Result], float | None]) -> list[Difference]:
    """Every comparison for which both arms have a common seed. measure: a fraction; runs where it is None are left out."""
    found = []
    for format in formats:
        for arm, other in COMPARISONS:
            by_seed = [
                {r.trial.seed: 100 * value for r in select(results, name, format) if (value := measure(r)) is not None}
                for name in (arm, other)
            ]
            pairs = [by_seed[0][seed] - by_seed[1][seed] for seed in by_seed[0].keys() & by_seed[1].keys()]
            if pairs:
                found.append(_difference(format, arm, other, pairs))
    return found


def _difference(format: str, arm: str, other: str, pairs: Sequence[float]) -> Difference:
    mean, spread = mean_and_spread(pairs)
    n = len(pairs)
    quantile = T_975[n - 2] if 2 <= n <= len(T_975) + 1 else 1.96 if n > 1 else math.inf
    half_width = quantile * spread / math.sqrt(n) if n > 1 else math.inf
    return Difference(format=format, arm=arm, other=other, mean=mean, half_width=half_width, num_seeds=n)


def table(results: Sequence[Result], format: str) -> list[list[str]]:
    """Header and one row per arm that has a run."""
    rows = [[*COLUMNS]]
    for arm in ARMS:
        found = select(results, arm, format)
        if found:
            rows.append([arm, *_row(found)])
    return rows


def _row(found: Sequence[Result]) -> list[str]:
    def over_seeds(values: Sequence[float | None], scale: float, digits: int = 1) -> str:
        known = [scale * value for value in values if value is not None]
        if not known:
            return "–"
        mean, spread = mean_and_spread(known)
        return f"{mean:.{digits}f} ({spread:.{digits}f})"

    def mean_of(key: str) -> list[float | None]:
        return [result.run.mean(key) for result in found]

    kl = [value for result in found if (value := result.final("mismatch/kl_rollout_old")) is not None]
    ratios = [max(result.run.series("mismatch/ratio_max")[1], default=1.0) for result in found]
    return [
        over_seeds([result.accuracy for result in found], 100),
        ", ".join("–" if result.accuracy is None else f"{100 * result.accuracy:.1f}" for result in found),
        over_seeds([result.rollout_accuracy for result in found], 100),
        f"{sum(result.collapsed for result in found)} of {len(found)}",
        over_seeds([result.final("accuracy/train") for result in found], 100),
        f"{statistics.fmean(kl):.2g}" if kl else "–",
        f"{max(ratios):.3g}",
        over_seeds(mean_of("mismatch/truncated_fraction"), 100, 3),
        over_seeds(mean_of("acr/changed_fraction"), 100, 4),
        over_seeds(mean_of("acr/changed_gradient_fraction"), 100, 4),
    ]


def first_iteration(results: Sequence[Result], format: str) -> str | None:
    """Whether invariant scaling changes what is sampled before anything was learned; None where an arm is missing."""
    pairs = [{r.trial.seed: r.run.metrics[0] for r in select(results, arm, format)} for arm in ("acr", "acr_scaling")]
    seeds = sorted(pairs[0].keys() & pairs[1].keys())
    if not seeds:
        return None
    keys = ("reward/mean", "rollout/num_tokens")
    same = sum(all(pairs[0][seed].get(key) == pairs[1][seed].get(key) for key in keys) for seed in seeds)
    kl = [statistics.fmean(pair[seed]["mismatch/kl_rollout_old"] for seed in seeds) for pair in pairs]
    return (
        f"{format}: in the first iteration, acr and acr_scaling sampled the same rewards and number of tokens on {same} of "
        f"{len(seeds)} seeds; KL(rollout || old) was {kl[0]:.3g} without scaling and {kl[1]:.3g} with it."
    )
