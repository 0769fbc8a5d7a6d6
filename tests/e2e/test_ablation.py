"""`qurl ablation` from runs to the page."""

import json

import pytest

pytestmark = pytest.mark.e2e


def test_an_ablation_trains_evaluates_and_writes_its_page(command_line):
    owned = ("run_name=", "quantization=")
    recipe = [word for word in command_line.train("x")[1:] if not word.startswith(owned)]
    arguments = (
        "ablation", *recipe, "num_steps=2", "data.eval.sums.path=sums.jsonl", "evaluation.at_start=false",
        "--arms", "acr", "--formats", "int8", "--seeds", "3", "--out", "compared",
    )  # fmt: skip
    code, output = command_line.run(*arguments)
    assert code == 0, output
    folder = command_line.folder / "compared"
    outcome = json.loads((folder / "outcomes.json").read_text())["outcomes"]["int8_acr_3"]
    assert outcome["stopped"] is None and 0 <= outcome["accuracy"]["sums"] <= 1
    evaluated = json.loads((folder / "int8_acr_3" / "metrics.jsonl").read_text().splitlines()[-1])["eval/sums/avg_at_k"]
    assert outcome["accuracy"]["sums"] == pytest.approx(evaluated, abs=0.25), "INT8 in vLLM and float32 in transformers are close"
    page = (folder / "index.html").read_text()
    assert "<td>acr</td>" in page and "data:image/svg+xml" in page
    ran = (folder / "int8_acr_3" / "metrics.jsonl").stat().st_mtime_ns
    (folder / "index.html").unlink()
    assert command_line.run(*arguments)[0] == 0
    assert (folder / "index.html").exists() and (folder / "int8_acr_3" / "metrics.jsonl").stat().st_mtime_ns == ran
