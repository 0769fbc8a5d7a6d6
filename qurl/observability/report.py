"""One self-contained HTML page about a run or several: figures, configuration differences, a few rollouts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from qurl.observability.figures import (
    PANELS,
    RUN_COLORS,
    Panel,
    curve_figure,
    sync_figure,
    time_figure,
    to_svg_uri,
    update_noise_figure,
)
from qurl.observability.run_data import RunData, load_runs

LAST = 10  # iterations that "final" averages over
MAX_SHOWN_CHARACTERS = 4000  # of a prompt or response
MAX_SHOWN_ROLLOUTS = 4  # per run

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 1180px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; border-bottom: 1px solid #ddd; padding-bottom: .2em; margin-top: 2em }
table { border-collapse: collapse } th, td { padding: .25em .8em; border-bottom: 1px solid #e5e5e5; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.figures { display: flex; flex-wrap: wrap; gap: 12px } .figures img { width: 560px; max-width: 100% }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .7em; margin: .3em 0 1em }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em }
"""


def write_report(run_dirs: Sequence[Path], out: Path) -> None:
    """Compare runs on one page that needs no other file and no network.

    run_dirs: run folders, at least one; the same folder twice counts once. Creates the folders of `out`. Raises ValueError for a
    folder without a finished iteration or with a broken file."""
    runs = load_runs(list(run_dirs))
    with rc_context({"text.parse_math": False}):  # a $ in a name is a $
        page = _page(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")  # a rollout may hold lone surrogates


def _page(runs: Sequence[RunData]) -> str:
    colors = list(islice(cycle(RUN_COLORS), len(runs)))
    sections = [
        "<h1>qurl report</h1>",
        _summary(runs, colors),
        _figures("Evaluation", (curve_figure(panel, runs, colors) for panel in _eval_panels(runs))),
        _figures("Training", (curve_figure(panel, runs, colors) for panel in PANELS)),
        _figures("Time and weight updates", (time_figure(runs), sync_figure(runs), *map(update_noise_figure, runs))),
        _config_section(runs),
        *(_rollout_section(run) for run in runs if run.rollouts),
    ]
    head = f'<head><meta charset="utf-8"><title>qurl report</title><style>{STYLE}</style></head>'
    return f'<!DOCTYPE html>\n<html lang="en">{head}<body>{"".join(sections)}</body></html>\n'


def _eval_panels(runs: Sequence[RunData]) -> list[Panel]:
    keys = {key for run in runs for record in run.evaluations for key in record if key.startswith("eval/")}
    return [Panel(title=key.removeprefix("eval/"), keys=(key,)) for key in sorted(keys)]


def _summary(runs: Sequence[RunData], colors: Sequence[str]) -> str:
    eval_keys = [panel.keys[0] for panel in _eval_panels(runs) if panel.keys[0].endswith("avg_at_k")]
    header = ["run", "iterations", f"reward, last {LAST}", f"accuracy, last {LAST}", *(f"best {key}" for key in eval_keys),
              "tokens/s", "s per iteration", "hours", "KL rollout-old", "largest ratio"]  # fmt: skip
    rows = []
    for run, color in zip(runs, colors, strict=True):
        step_s, ratios = run.series("time/step_s")[1], run.series("mismatch/ratio_max")[1]
        values = [
            len(run.metrics), run.mean("reward/mean", LAST), run.mean("accuracy/train", LAST),
            *(max(run.series(key)[1], default=None) for key in eval_keys), run.mean("rollout/tokens_per_s"),
            run.mean("time/step_s"), sum(step_s) / 3600 if step_s else None, run.mean("mismatch/kl_rollout_old"),
            max(ratios, default=None),
        ]  # fmt: skip
        name = f'<td><span class="swatch" style="background:{color}"></span>{escape(run.label)}</td>'
        rows.append(name + "".join(f'<td class="number">{_number(v)}</td>' for v in values))
    return "<h2>Summary</h2>" + _table(header, rows)


def _number(value: float | None) -> str:
    if value is None:
        return "&ndash;"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _figures(title: str, figures: Iterable[Figure | None]) -> str:
    images = [_image(figure) for figure in figures if figure is not None]
    return f'<h2>{title}</h2><div class="figures">{"".join(images)}</div>' if images else ""


def _image(figure: Figure) -> str:
    return f'<img alt="{escape(figure.axes[0].get_title(loc="left"))}" src="{to_svg_uri(figure)}">'


def _config_section(runs: Sequence[RunData]) -> str:
    """Where the runs' configurations differ; the whole configuration of a single run."""
    keys = sorted({key for run in runs for key in run.config})
    if len(runs) > 1:
        keys = [key for key in keys if len({repr(run.config.get(key)) for run in runs}) > 1]
    missing = [run.label for run in runs if not run.config]
    note = f"<p>No config.yaml in {escape(', '.join(missing))}.</p>" if missing else ""
    rows = [f"<td>{escape(key)}</td>" + "".join(f"<td>{_config_value(run, key)}</td>" for run in runs) for key in keys]
    table = _table(["key", *(run.label for run in runs)], rows) if rows else ""
    if len(runs) == 1:
        return f"<h2>Configuration</h2>{note}<details><summary>{len(keys)} values</summary>{table}</details>"
    return f"<h2>Configuration differences</h2>{note}{table or '<p>None.</p>'}"


def _config_value(run: RunData, key: str) -> str:
    return escape(repr(run.config[key])) if key in run.config else "&ndash;"


def _rollout_section(run: RunData) -> str:
    shown = run.rollouts
    if len(shown) > MAX_SHOWN_ROLLOUTS:  # they are ordered by reward: keep lowest and highest
        shown = [shown[round(i * (len(shown) - 1) / (MAX_SHOWN_ROLLOUTS - 1))] for i in range(MAX_SHOWN_ROLLOUTS)]
    items = "".join(_rollout(record) for record in shown)
    return f"<h2>Rollouts of {escape(run.label)}, step {escape(str(shown[0].get('step')))}</h2>{items}"


def _rollout(record: dict[str, Any]) -> str:
    facts = [f"reward {record.get('reward')}", f"ground truth {record.get('ground_truth')}", f"{record.get('num_tokens')} tokens",
             f"finish reason {record.get('finish_reason')}", f"weight version {record.get('weight_version')}"]  # fmt: skip
    if record.get("reward_error"):
        facts.append(f"reward error {record['reward_error']}")
    summary = escape(_shortened(", ".join(facts), 300))
    texts = "".join(f"<b>{name}</b><pre>{escape(_shortened(str(record.get(name, ''))))}</pre>" for name in ("prompt", "response"))
    return f"<details open><summary>{summary}</summary>{texts}</details>"


def _shortened(text: str, limit: int = MAX_SHOWN_CHARACTERS) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text) - limit} more characters)"


def _table(header: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in header)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
