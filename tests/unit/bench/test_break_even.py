"""Break-even of formats, from given times."""

import json

import pytest
import yaml

from qurl.bench.break_even import run_break_even

RATIOS = {"none": 1.0, "int8": 2.0, "fp8": 0.5, "lobcq": 4.0}  # of decoding speed
COSTS = {"none": 1.0, "int8": 3.0, "fp8": 1.0, "lobcq": 11.0}  # of sync


@pytest.fixture
def files(tmp_path):
    """A run of 10 s with 6 s of rollouts and 0.5 s of sync, and two benchmarks."""
    run = tmp_path / "run"
    run.mkdir()
    times = [(50.0, 40.0, 5.0), (10.0, 6.0, 0.5), (10.0, 6.0, 0.5)]
    steps = [{"step": i, "time/step_s": t, "time/rollout_s": r, "time/sync_s": s} for i, (t, r, s) in enumerate(times)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (run / "config.yaml").write_text(yaml.safe_dump({"quantization": {"format": "none"}}))
    rollout = [
        {"format": name, "baseline": "none", "shape": "0.4b", "batch_size": size, "ratio": ratio * size}
        for size in (1, 16) for name, ratio in RATIOS.items()
    ]  # fmt: skip
    rollout.append({"format": "int8", "baseline": "stock_int8", "shape": "0.4b", "batch_size": 1, "ratio": 9.0})
    sync = [{"quantization_format": name, "transport": "gloo", "total_ratio": cost} for name, cost in COSTS.items()]
    for name, rows in (("rollout", rollout), ("sync", sync)):
        (tmp_path / name).write_text(json.dumps(rows))
    return {"run": run, "rollout": tmp_path / "rollout", "sync": tmp_path / "sync"}


def test_an_iteration_gains_what_rollouts_gain_less_what_sync_costs(files):
    rows = {row.format: row for row in run_break_even(**files, batch_size=1)}
    assert rows["int8"].iteration_s == pytest.approx(10 - 3 + 1)
    assert rows["int8"].speed_up == pytest.approx(10 / 8)
    assert rows["int8"].break_even_share == pytest.approx(0.2)  # 2 s of rollouts lose the 1 s that sync costs more
    assert rows["lobcq"].iteration_s == pytest.approx(10 - 4.5 + 5) and rows["lobcq"].break_even_share > rows["lobcq"].rollout_share
    assert rows["fp8"].break_even_share == float("inf") and rows["fp8"].speed_up == pytest.approx(10 / 16)
    assert (rows["int8"].rollout_share, rows["int8"].sync_share) == (0.6, 0.05)


def test_rows_are_relative_to_the_format_the_run_had(files):
    (files["run"] / "config.yaml").write_text(yaml.safe_dump({"quantization": {"format": "int8"}}))
    rows = {row.format: row for row in run_break_even(**files, batch_size=1)}
    assert (rows["none"].decoding_ratio, rows["lobcq"].decoding_ratio) == (0.5, 2.0)
    assert rows["none"].sync_cost == pytest.approx(1 / 3) and "int8" not in rows
    assert [row.speed_up for row in rows.values()] == sorted((row.speed_up for row in rows.values()), reverse=True)


def test_what_does_not_fit_is_one_line(files, tmp_path):
    with pytest.raises(ValueError, match="fit 2 measurements of .*0.4b at batch size 1, 0.4b at batch size 16; name one"):
        run_break_even(**files)
    with pytest.raises(ValueError, match="transport nccl fits 0 measurements of .*, which has gloo"):
        run_break_even(**files, batch_size=1, transport="nccl")
    with pytest.raises(ValueError, match="is no output of `qurl bench rollout --json`"):
        run_break_even(**{**files, "rollout": files["sync"]})
    (files["run"] / "config.yaml").write_text(yaml.safe_dump({"quantization": {"format": "nf4"}}))
    with pytest.raises(ValueError, match="and not nf4, which .* had; measure again"):
        run_break_even(**files, batch_size=1)
