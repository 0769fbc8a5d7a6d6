"""The plots of a report, as matplotlib figures without global state."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qurl.observability.run_data import RunData
from qurl.observability.timeline import STAGES

RUN_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#000000")  # Okabe-Ito, no yellow
STAGE_COLORS = {
    "rollout": "#0072b2", "reward": "#56b4e9", "probe": "#888888", "logprob": "#cc79a7", "update": "#009e73", "sync": "#e69f00",
    "eval": "#f0e442", "checkpoint": "#d55e00", "idle": "#bbbbbb",
}
LINE_STYLES = ("-", "--", ":", "-.")
SYNC_PARTS = {"encode": "#009e73", "transfer": "#e69f00", "install": "#0072b2"}
UPDATE_TO_NOISE = "quantization/update_to_noise/"
SMOOTHING_FROM = 60  # points; a longer curve is drawn pale, with its running mean over it


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """Curves over training iterations."""

    title: str
    keys: tuple[str, ...]  # one line style each, one color per run
    unit: str = ""
    log: bool = False  # logarithmic axis, where all values are positive


PANELS = (
    Panel(title="Reward", keys=("reward/mean",)),
    Panel(title="Training accuracy", keys=("accuracy/train",)),
    Panel(title="Mismatch: KL(rollout || old)", keys=("mismatch/kl_rollout_old",), unit="nats per token", log=True),
    Panel(title="Mismatch: largest ratio old / rollout", keys=("mismatch/ratio_max",), log=True),
    Panel(title="Mismatch in parts (probe)", unit="nats per token", log=True,
          keys=("mismatch/quantization_kl", "mismatch/engine_kl", "mismatch/engine_kl_floor",
                "mismatch/staleness_kl")),
    Panel(title="Effective sample size of the weights", keys=("mismatch/ess_fraction",), unit="fraction"),
    Panel(title="Pool in a fallback (guard)", keys=("rollout/fallback",)),
    Panel(title="Tokens cut by a clip bound", keys=("policy/clip_high_fraction", "policy/clip_low_fraction"), unit="fraction"),
    Panel(title="Tokens touched by truncation and ACR", unit="fraction",
          keys=("mismatch/truncated_fraction", "acr/widened_fraction", "acr/changed_fraction", "mismatch/rejected_fraction")),
    Panel(title="Gradient in tokens that ACR changed", keys=("acr/changed_gradient_fraction",), unit="fraction"),
    Panel(title="Policy drift: KL(old || current)", keys=("policy/kl_old_current",), unit="nats per token", log=True),
    Panel(title="KL to the reference", keys=("policy/kl_loss", "policy/kl_reward"), unit="nats per token"),
    Panel(title="Entropy", keys=("policy/entropy",), unit="nats per token"),
    Panel(title="Gradient norm", keys=("policy/grad_norm",), log=True),
    Panel(title="Variance of returns that the critic explains", keys=("critic/explained_variance",), unit="fraction"),
    Panel(title="Critic: clipped value loss", keys=("critic/loss",), log=True),
    Panel(title="Response length", keys=("rollout/response_length_mean",), unit="tokens"),
    Panel(title="Responses that are cut or loop", unit="fraction",
          keys=("rollout/truncated_fraction", "rollout/repetition_fraction", "rollout/filtered_fraction")),
    Panel(title="Length penalty", keys=("reward/overlong_penalty_mean",)),
    Panel(title="Groups whose rewards differ, and sampled groups that were not trained", unit="fraction",
          keys=("reward/informative_group_fraction", "rollout/discarded_fraction")),
    Panel(title="Batches sampled for an iteration", keys=("rollout/num_generations",)),
    Panel(title="Stage", keys=("rollout/stage",)),
    Panel(title="Staleness", keys=("rollout/staleness_max",), unit="weight versions"),
    Panel(title="Rollout speed", keys=("rollout/tokens_per_s",), unit="tokens per second"),
    Panel(title="Iteration", keys=("time/step_s",), unit="seconds"),
    Panel(title="Quantized codes changed per update", keys=("sync/changed_code_fraction",), unit="fraction", log=True),
    Panel(title="Update beside quantization error", log=True,
          keys=("quantization/update_to_noise_mean", "quantization/update_to_noise_min")),
)  # fmt: skip


def curve_figure(panel: Panel, runs: Sequence[RunData], colors: Sequence[str]) -> Figure | None:
    """The panel's curves, None where no run logged any of its keys."""
    curves = [(color, style, key, run, *run.series(key)) for run, color in zip(runs, colors, strict=True)
              for key, style in zip(panel.keys, LINE_STYLES, strict=False)]  # fmt: skip
    curves = [c for c in curves if c[4]]
    if not curves:
        return None
    figure, axes = _figure(panel.title)
    several_runs, several_keys = len(runs) > 1, len(panel.keys) > 1
    for color, style, key, run, steps, values in curves:
        parts = [run.label] * several_runs + [key.rpartition("/")[2]] * several_keys
        _draw_curve(axes, steps, values, color, style, " ".join(parts))
    if panel.log and all(v > 0 for c in curves for v in c[5]):
        axes.set_yscale("log")
    axes.set_xlabel("iteration")
    axes.set_ylabel(panel.unit)
    if several_runs or several_keys:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def update_noise_figure(run: RunData) -> Figure | None:
    """|update| / |quantization error| of each matrix, mean over iterations: depth to the right, a line for each kind of layer. None
    without sync.track_updates. Below 1 one update is smaller than the error that the rollout policy sees it through."""
    kinds: dict[str, dict[int, float]] = {}
    for key in sorted({key for record in run.metrics for key in record if key.startswith(UPDATE_TO_NOISE)}):
        layer = re.search(r"\.(\d+)\.", key)
        mean = run.mean(key)
        if layer and mean is not None:
            kinds.setdefault(key.rpartition(".")[2], {})[int(layer[1])] = mean
    if not kinds:
        return None
    figure, axes = _figure(f"Update / quantization error by layer: {run.label}")
    for (kind, ratios), color in zip(kinds.items(), cycle(RUN_COLORS), strict=False):
        depths = sorted(ratios)
        axes.plot(depths, [ratios[depth] for depth in depths], color=color, label=kind, marker="o", markersize=3, linewidth=1.2)
    axes.axhline(1.0, color="#222222", linewidth=0.8, linestyle=":")
    if all(ratio > 0 for ratios in kinds.values() for ratio in ratios.values()):
        axes.set_yscale("log")
    axes.set_xlabel("layer")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def time_figure(runs: Sequence[RunData]) -> Figure | None:
    """Mean seconds of an iteration by stage, one stacked bar per run."""
    parts = {name: [run.mean(f"time/{name}_s") or 0.0 for run in runs] for name in (*STAGES, "idle")}
    return _stacked_bars("Where an iteration's time goes", [r.label for r in runs], parts, STAGE_COLORS)


def sync_figure(runs: Sequence[RunData]) -> Figure | None:
    """Mean seconds of a weight update by part, one stacked bar per run; encode and transfer overlap."""
    parts = {name: [run.mean(f"sync/{name}_s") or 0.0 for run in runs] for name in SYNC_PARTS}
    return _stacked_bars("Work of a weight update (parts may overlap in time)", [r.label for r in runs], parts, SYNC_PARTS)


def to_svg_uri(figure: Figure) -> str:
    """The figure as a data: URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure(title: str, height: float = 3.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _draw_curve(axes: Axes, steps: list[int], values: list[float], color: str, style: str, label: str) -> None:
    marker = "o" if len(values) <= 30 else None
    if len(values) < SMOOTHING_FROM:
        axes.plot(steps, values, color=color, linestyle=style, label=label, marker=marker, markersize=3, linewidth=1.5)
        return
    axes.plot(steps, values, color=color, linestyle=style, alpha=0.25, linewidth=0.8)
    axes.plot(steps, running_mean(values, len(values) // 20), color=color, linestyle=style, label=label, linewidth=1.6)


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean over the value and up to `reach` neighbors on each side; fewer at the ends."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _stacked_bars(title: str, labels: list[str], parts: dict[str, list[float]], colors: dict[str, str]) -> Figure | None:
    totals = [sum(seconds) for seconds in zip(*parts.values(), strict=True)]
    if not any(totals):
        return None
    figure, axes = _figure(title, height=1.7 + 0.4 * len(labels))
    left = [0.0] * len(labels)
    rows = range(len(labels))
    for name, seconds in parts.items():
        if not any(seconds):
            continue
        axes.barh(rows, seconds, left=left, color=colors[name], label=name, height=0.6, edgecolor="white", linewidth=0.5)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    for row, total in zip(rows, totals, strict=True):
        axes.text(total, row, f" {total:.3g} s", va="center", fontsize=8)
    axes.set_yticks(rows, labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator())
    axes.set_xlabel("seconds")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure
