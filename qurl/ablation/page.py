"""One self-contained HTML page: settings, what the data supports, tables, curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from matplotlib import rc_context

from qurl.ablation.figures import CURVES, arm_figure
from qurl.ablation.summary import LAST_FRACTION, Difference, Result, differences, first_iteration, select, table
from qurl.ablation.trials import ARMS
from qurl.observability.figures import to_svg_uri
from qurl.observability.report import STYLE


def write_page(results: Sequence[Result], formats: Sequence[str], command: str, out: Path) -> None:
    """results: of finished runs, at least one. command: what repeats them."""
    with rc_context({"text.parse_math": False}):
        body = "".join([
            "<h1>qurl ablation</h1>", _settings(results, command), _findings(results, formats),
            *(_of_format(results, name) for name in formats), _arms(results),
        ])  # fmt: skip
    head = f'<head><meta charset="utf-8"><title>qurl ablation</title><style>{STYLE}</style></head>'
    out.write_text(f'<!DOCTYPE html>\n<html lang="en">{head}<body>{body}</body></html>\n', encoding="utf-8")


def _settings(results: Sequence[Result], command: str) -> str:
    seeds = sorted({result.trial.seed for result in results})
    minutes = sum(result.outcome.seconds for result in results) / 60
    config = results[0].run.config
    facts = (
        f"{len(results)} runs of {config.get('num_steps')} iterations, seeds {', '.join(map(str, seeds))}; model "
        f"{config.get('model.path')}, {config.get('rollout.num_prompts_per_step')} prompts x "
        f"{config.get('rollout.num_samples_per_prompt')} samples, {config.get('learner.num_mini_batches')} optimizer steps per "
        f"iteration, learning rate {config.get('learner.learning_rate')}. {minutes:.0f} minutes of runs in all."
    )
    return f"<p>{escape(facts)}</p><pre>{escape(command)}</pre>"


def _findings(results: Sequence[Result], formats: Sequence[str]) -> str:
    rule = (
        "Differences of held-out accuracy, greedy, paired by seed, with 95 % intervals (Student's t). What is listed as supported "
        "leaves out zero. No correction is made for the number of comparisons: about one in twenty leaves out zero by chance."
    )
    measures: dict[str, Callable[[Result], float | None]] = {
        "The trained policy in full precision": lambda result: result.accuracy,
        "The policy in the rollouts' own precision": lambda result: result.rollout_accuracy,
    }
    found = {title: differences(results, formats, measure) for title, measure in measures.items()}
    first = [sentence for name in formats if (sentence := first_iteration(results, name))]
    return (
        f"<h2>What the data supports</h2><p>{rule}</p>{_by_measure(found, is_resolved=True)}"
        f"<h2>What it does not</h2>{_by_measure(found, is_resolved=False)}"
        f"{'<h2>Scaling before anything is learned</h2>' + _list(first) if first else ''}"
    )


def _by_measure(found: Mapping[str, Sequence[Difference]], is_resolved: bool) -> str:
    parts = []
    for title, of_measure in found.items():
        sentences = [difference.sentence() for difference in of_measure if difference.resolved is is_resolved]
        parts.append(f"<p>{escape(title)}:</p>{_list(sentences) or '<p>Nothing.</p>'}")
    return "".join(parts)


def _of_format(results: Sequence[Result], name: str) -> str:
    header, *rows = table(results, name)
    figures = "".join(
        f'<img alt="{escape(curve.title)}" src="{to_svg_uri(figure)}">'
        for curve in CURVES
        if (figure := arm_figure(curve, {arm: [r.run for r in select(results, arm, name)] for arm in ARMS}))
    )
    note = (
        f"Mean (standard deviation over seeds). Collapsed: the training accuracy of the last {LAST_FRACTION:.0%} of the iterations "
        "is below half of the best stretch of that length, or a guard stopped the run. Curves: mean over seeds, band from the "
        "lowest to the highest seed."
    )
    return f'<h2>{escape(name)}</h2>{_table(header, rows)}<p>{note}</p><div class="figures">{figures}</div>'


def _arms(results: Sequence[Result]) -> str:
    stopped = [f"{r.trial.run_name}: {r.outcome.stopped}" for r in results if r.outcome.stopped]
    rows = [[name, arm.what, " ".join(arm.overrides)] for name, arm in ARMS.items()]
    return (
        f"<h2>Arms</h2>{_table(['arm', 'what', 'overrides'], rows)}"
        f"{'<h2>Stopped by a guard</h2>' + _list(stopped) if stopped else ''}"
    )


def _list(items: Iterable[str]) -> str:
    found = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{found}</ul>" if found else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
