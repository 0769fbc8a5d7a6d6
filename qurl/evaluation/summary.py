"""Records of finished problems -> figures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from statistics import fmean
from typing import Any

from qurl.evaluation.record import ProblemRecord
from qurl.rewards.accuracy import Estimate, avg_at_k, estimate, is_right, maj_at_k, pass_at_k


def summarize(records: Sequence[ProblemRecord], ks: Sequence[int], has_votes: bool, seed: int) -> dict[str, Any]:
    """The figures of one benchmark as JSON values; `records` in any order.

    avg@k and maj@k are over all samples of a problem, pass@k for each of `ks`; each with its bootstrap interval over problems.
    has_votes: False leaves maj@k out, where the reward function has no votes."""
    ordered = sorted(records, key=lambda record: record.problem)
    right = [[is_right(reward) for reward in record.rewards] for record in ordered]
    num_samples = len(right[0])

    def over_problems(figure: str, values: Sequence[float]) -> dict[str, float]:
        return asdict(estimate(values, seed=_seed(seed, records[0].benchmark, figure)))

    summary: dict[str, Any] = {
        "num_problems": len(ordered),
        "num_samples": num_samples,
        "avg_at_k": over_problems("avg", [avg_at_k(flags) for flags in right]),
        "pass_at_k": {str(k): over_problems(f"pass{k}", [pass_at_k(flags, k) for flags in right]) for k in ks},
    }
    if has_votes:
        majority = [maj_at_k(flags, record.votes) for flags, record in zip(right, ordered, strict=True)]
        summary["maj_at_k"] = over_problems("maj", majority)
    return summary | {
        "error_count": sum(error is not None for record in ordered for error in record.errors),
        "truncated_fraction": fmean(chain.from_iterable(record.truncated for record in ordered)),
        "response_length_mean": fmean(chain.from_iterable(record.num_tokens for record in ordered)),
    }


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """A header and a line per benchmark, of what summarize returned by name; percentages with their 95 % intervals."""
    ks = sorted({int(k) for summary in results.values() for k in summary["pass_at_k"]})
    rows = [["benchmark", "problems", "samples", "avg@k", *(f"pass@{k}" for k in ks), "maj@k", "errors", "truncated", "tokens"]]
    for name, summary in results.items():
        rows.append([
            name, str(summary["num_problems"]), str(summary["num_samples"]), _percent(summary["avg_at_k"]),
            *(_percent(summary["pass_at_k"][str(k)]) for k in ks), _percent(summary.get("maj_at_k")),
            str(summary["error_count"]), f"{100 * summary['truncated_fraction']:.1f} %", f"{summary['response_length_mean']:.0f}",
        ])  # fmt: skip
    return rows


def _percent(figure: dict[str, float] | None) -> str:
    if figure is None:
        return "-"
    found = Estimate(**figure)
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _seed(seed: int, *names: str) -> int:
    """Of one figure's bootstrap, whatever else is evaluated beside it."""
    return int.from_bytes(hashlib.blake2b("/".join([str(seed), *names]).encode(), digest_size=8).digest(), "little")
