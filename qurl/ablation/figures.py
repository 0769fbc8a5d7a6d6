"""Curves of arms: the mean over seeds, a band from the lowest to the highest."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qurl.observability.figures import running_mean
from qurl.observability.run_data import RunData

COLORS = ("#000000", "#d55e00", "#e69f00", "#cc79a7", "#56b4e9", "#0072b2", "#009e73", "#b8860b", "#7b4fa3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One panel."""

    title: str
    key: str
    log: bool = False
    smooth: bool = False  # running mean over a twentieth of the iterations to either side


CURVES = (
    Curve(title="Training accuracy", key="accuracy/train", smooth=True),
    Curve(title="Mismatch: KL(rollout || old), nats per token", key="mismatch/kl_rollout_old", log=True),
    Curve(title="Largest ratio old / rollout", key="mismatch/ratio_max", log=True, smooth=True),
    Curve(title="Gradient norm before clipping", key="policy/grad_norm", log=True, smooth=True),
    Curve(title="Tokens cut by the upper clip bound", key="policy/clip_high_fraction", smooth=True),
    Curve(title="Entropy, nats per token", key="policy/entropy", smooth=True),
    Curve(title="Codes changed per update", key="sync/changed_code_fraction", log=True, smooth=True),
    Curve(title="Response length, tokens", key="rollout/response_length_mean", smooth=True),
)


def arm_figure(curve: Curve, arms: Mapping[str, Sequence[RunData]]) -> Figure | None:
    """arms: the runs of each, by name; those without the metric are left out. None where no run has it."""
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    lowest = float("inf")
    for (arm, runs), color in zip(arms.items(), COLORS, strict=True):
        by_step: dict[int, list[float]] = {}
        for run in runs:
            steps, values = run.series(curve.key)
            for step, value in zip(steps, running_mean(values, len(values) // 20) if curve.smooth else values, strict=True):
                by_step.setdefault(step, []).append(value)
        if by_step:
            steps = sorted(by_step)
            axes.plot(steps, [statistics.fmean(by_step[step]) for step in steps], color=color, label=arm, linewidth=1.5)
            axes.fill_between(
                steps,
                [min(by_step[step]) for step in steps],
                [max(by_step[step]) for step in steps],
                color=color,
                alpha=0.1,
                linewidth=0,
            )
            lowest = min(lowest, *(min(values) for values in by_step.values()))
    if not axes.lines:
        return None
    if curve.log and lowest > 0:
        axes.set_yscale("log")
    axes.set_title(curve.title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel("iteration")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure
