import base64
import json
import re
from xml.etree import ElementTree

import pytest
import yaml

from qurl.observability.console import SHOWN
from qurl.observability.figures import LINE_STYLES, PANELS, update_noise_figure
from qurl.observability.metrics import METRICS
from qurl.observability.report import write_report
from qurl.observability.run_data import load_runs
from qurl.observability.step_log import StepLog


def make_run(folder, *, steps=3, correction="acr", response="4"):
    log = StepLog(folder / "metrics.jsonl")
    for step in range(steps):
        log.append(step, {"reward/mean": 0.1 * step, "mismatch/kl_rollout_old": 1e-3, "time/step_s": 3.0, "time/rollout_s": 2.0,
                          "policy/grad_norm": float("nan"), "sync/encode_s": 0.1})
    log.close()
    log = StepLog(folder / "evaluations.jsonl")
    log.append(0, {"eval/gsm8k/avg_at_k": 0.25})
    log.close()
    config = {"seed": 0, "algorithm": {"correction": {"name": correction}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "rollouts").mkdir()
    record = {"step": 1, "prompt": "2+2", "response": response, "reward": 1.0, "ground_truth": "<4>"}
    (folder / "rollouts" / "step_000001.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def page_of(tmp_path, *runs):
    out = tmp_path / "some" / "where" / "report.html"
    write_report(list(runs), out)
    return out.read_text(encoding="utf-8")


def test_the_page_is_self_contained_and_its_figures_are_svg(tmp_path):
    page = page_of(tmp_path, make_run(tmp_path / "a"))
    images = re.findall(r'<img alt="([^"]+)" src="([^"]+)"', page)
    assert {"Reward", "gsm8k/avg_at_k", "Where an iteration&#x27;s time goes"} <= {alt for alt, _ in images}
    assert "Gradient norm" not in page  # no finite value of it
    for _, source in images:
        head, _, data = source.partition(",")
        assert head == "data:image/svg+xml;base64"
        ElementTree.fromstring(base64.b64decode(data))
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_every_panel_shows_metrics_of_the_table_and_no_metric_twice():
    keys = [key for panel in PANELS for key in panel.keys]
    assert set(keys) | set(SHOWN.values()) <= METRICS.keys() and len(keys) == len(set(keys))
    assert all(len(panel.keys) <= len(LINE_STYLES) for panel in PANELS)


def test_updates_beside_the_quantization_error_are_drawn_by_depth_with_a_line_for_each_kind_of_layer(tmp_path):
    log = StepLog(tmp_path / "a" / "metrics.jsonl")
    for step, factor in enumerate((1.0, 3.0)):
        log.append(step, {f"quantization/update_to_noise/model.layers.{layer}.mlp.{kind}": factor * (layer + 1)
                          for layer in (2, 10) for kind in ("up_proj", "gate_proj")})  # fmt: skip
    log.close()
    [run] = load_runs([tmp_path / "a"])
    [axes] = update_noise_figure(run).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines[:-1]}
    assert lines == dict.fromkeys(("gate_proj", "up_proj"), [[2, 6], [10, 22]])
    assert "Update / quantization error by layer: a" in page_of(tmp_path, tmp_path / "a")
    assert update_noise_figure(load_runs([make_run(tmp_path / "b")])[0]) is None


def test_rollouts_and_names_cannot_inject_markup(tmp_path):
    page = page_of(tmp_path, make_run(tmp_path / "<b>$run", response="</pre><script>alert(1)</script> \ud800"))
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "<b>$run" not in page and "&lt;4&gt;" in page


def test_a_comparison_shows_only_the_configuration_that_differs(tmp_path):
    page = page_of(tmp_path, make_run(tmp_path / "a"), make_run(tmp_path / "b", correction="tis"))
    table = page[page.index("Configuration differences"):]
    assert "algorithm.correction.name" in table and "&#x27;tis&#x27;" in table
    assert "<td>seed</td>" not in table


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    page = page_of(tmp_path, make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run"))
    assert str(tmp_path / "x" / "run") in page and str(tmp_path / "y" / "run") in page


def test_rollouts_beyond_the_last_iteration_are_left_out(tmp_path):
    run = make_run(tmp_path / "a", steps=2)
    (run / "rollouts" / "step_000009.jsonl").write_text(json.dumps({"step": 9, "response": "stale"}) + "\n")
    assert "stale" not in page_of(tmp_path, run)


def test_a_running_run_with_a_line_cut_short_is_reported(tmp_path):
    run = make_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    assert ">3</td>" in page_of(tmp_path, run)


def test_a_long_curve_and_a_run_without_config_or_rollouts_are_reported(tmp_path):
    log = StepLog(tmp_path / "bare" / "metrics.jsonl")
    for step in range(100):
        log.append(step, {"reward/mean": 0.5, "eval/aime/avg_at_k": 0.25})
    log.close()
    page = page_of(tmp_path, tmp_path / "bare")
    assert "No config.yaml in bare" in page and 'alt="aime/avg_at_k"' in page


def break_nothing_there(folder):
    return folder / "nowhere"


def break_empty_folder(folder):
    folder.mkdir()
    return folder


def break_no_iteration(folder):
    make_run(folder, steps=0)
    return folder


def break_line(folder):
    make_run(folder)
    (folder / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    return folder


def break_config(folder):
    make_run(folder)
    (folder / "config.yaml").write_text("- a list\n")
    return folder


def break_rollouts(folder):
    make_run(folder)
    (folder / "rollouts" / "step_000002.jsonl").write_text("nonsense\n")
    return folder


@pytest.mark.parametrize(
    "broken, message",
    [
        (break_nothing_there, "nowhere is not a folder"), (break_empty_folder, "metrics.jsonl does not exist"),
        (break_no_iteration, "metrics.jsonl is empty"), (break_line, "metrics.jsonl:2 is not JSON"),
        (break_config, "config.yaml is not a configuration"), (break_rollouts, "step_000002.jsonl is not JSON lines"),
    ],
)  # fmt: skip
def test_a_broken_run_is_refused_by_name_and_nothing_is_written(broken, message, tmp_path):
    out = tmp_path / "report.html"
    with pytest.raises(ValueError, match=message):
        write_report([make_run(tmp_path / "good"), broken(tmp_path / "bad")], out)
    assert not out.exists()


def test_a_report_on_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "report.html")
