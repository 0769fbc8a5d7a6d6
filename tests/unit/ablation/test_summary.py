"""Tables, differences and the page, over runs made up here."""

import json
import math
import statistics

import pytest

from qurl.ablation.outcomes import Outcome
from qurl.ablation.page import write_page
from qurl.ablation.summary import Result, differences, first_iteration, table
from qurl.ablation.trials import Trial
from qurl.observability.run_data import load_runs

ACCURACY = Result.accuracy.fget


def result(folder, arm, seed, accuracy, train=(0.1, 0.5, 0.9, 0.9), format="int8", stopped=None):
    trial = Trial(arm=arm, format="none" if arm == "bf16" else format, seed=seed)
    run_dir = folder / trial.run_name
    run_dir.mkdir()
    same = {"mismatch/kl_rollout_old": 1e-3, "mismatch/ratio_max": 2.0 + seed, "rollout/num_tokens": 100.0}
    rows = [{"step": step, "accuracy/train": value, "reward/mean": value, **same} for step, value in enumerate(train)]
    rows[-1] |= {"eval/a/avg_at_k": 0.25, "eval/b/avg_at_k": 0.75, "eval/b/response_length_mean": 7.0}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = None if accuracy is None else {"held_out": accuracy}
    return Result(trial=trial, outcome=Outcome(seconds=60.0, stopped=stopped, accuracy=known), run=load_runs([run_dir])[0])


def test_a_difference_is_resolved_where_the_interval_of_students_t_leaves_out_zero(tmp_path):
    tis, acr = (0.50, 0.60, 0.70), (0.53, 0.62, 0.74)
    results = [result(tmp_path, "tis", seed, value) for seed, value in enumerate(tis)]
    results += [result(tmp_path, "acr", seed, value) for seed, value in enumerate(acr)]
    [found] = differences(results, ["int8"], ACCURACY)
    pairs = [100 * (a - b) for a, b in zip(acr, tis, strict=True)]
    assert found.mean == pytest.approx(statistics.fmean(pairs)) == pytest.approx(3.0)
    assert found.half_width == pytest.approx(4.303 * statistics.stdev(pairs) / math.sqrt(3))
    assert found.resolved is (abs(found.mean) > found.half_width) is True
    assert found.sentence() == "int8: acr is better than tis (+3.0 ± 2.5 points)."
    noisy = differences([*results[:5], result(tmp_path, "acr", 7, 0.1)], ["int8"], ACCURACY)[0]
    assert not noisy.resolved and noisy.num_seeds == 2 and "is not resolved by 2 seeds" in noisy.sentence()


def test_one_seed_resolves_nothing(tmp_path):
    results = [result(tmp_path, "tis", 0, 0.2), result(tmp_path, "acr", 0, 0.9)]
    [found] = differences(results, ["int8"], ACCURACY)
    assert not found.resolved and found.sentence() == "int8: acr against tis is not resolved by 1 seeds (+70.0 points)."


def test_collapse_is_half_of_the_best_or_a_guard(tmp_path):
    assert not result(tmp_path, "acr", 0, 0.9).collapsed
    assert result(tmp_path, "acr", 1, 0.1, train=(0.1, 0.9, 0.5, 0.4)).collapsed
    assert result(tmp_path, "acr", 2, None, stopped="stopped: the loss is not finite").collapsed


def test_the_table_has_a_row_per_arm_with_the_baseline_in_every_format(tmp_path):
    results = [
        result(tmp_path, "bf16", 0, 0.9), result(tmp_path, "naive", 0, 0.0, train=(0.5, 0.0)),
        result(tmp_path, "naive", 1, None, stopped="x"), result(tmp_path, "tis", 0, 0.8, format="mxfp4"),
    ]  # fmt: skip
    int8, mxfp4 = table(results, "int8"), table(results, "mxfp4")
    assert [row[0] for row in int8] == ["arm", "bf16", "naive"] and [row[0] for row in mxfp4] == ["arm", "bf16", "tis"]
    assert int8[1][1:5] == ["90.0 (0.0)", "90.0", "50.0 (0.0)", "0 of 1"]
    assert int8[2][1:5] == ["0.0 (0.0)", "0.0, –", "50.0 (0.0)", "2 of 2"], "the second was stopped before it was evaluated"
    assert all(len(row) == len(int8[0]) for row in int8)


def test_the_page_holds_findings_tables_figures_and_the_command(tmp_path):
    accuracies = {"tis": 0.5, "acr": 0.6, "acr_scaling": 0.5}
    results = [result(tmp_path, arm, seed, value) for arm, value in accuracies.items() for seed in (0, 1, 2)]
    results.append(result(tmp_path, "naive", 0, None, stopped="stopped: loss <nan>"))
    write_page(results, ["int8"], "qurl ablation recipe=x & y", tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert "int8: acr is better than tis (+10.0 ± 0.0 points)." in page
    assert page.index("What the data supports") < page.index("acr is better") < page.index("What it does not")
    assert page.count("int8: acr against tis is not resolved by 3 seeds (+0.0 ± 0.0 points).") == 1, "in the rollouts' precision"
    assert "acr_scaling sampled the same rewards and number of tokens on 3 of 3 seeds" in page
    assert "int8_naive_0: stopped: loss &lt;nan&gt;" in page and "qurl ablation recipe=x &amp; y" in page
    assert page.count("data:image/svg+xml") == 3, "one figure per metric that the runs have"
    assert first_iteration(results[:3], "int8") is None
