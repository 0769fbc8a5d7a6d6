"""What `qurl bench` says beside its rows."""

import json
import os

import pytest

from qurl.bench import break_even
from qurl.cli import bench
from qurl.cli.main import main


@pytest.mark.parametrize("load", [0.3, 900.0])
def test_a_busy_machine_is_said_in_the_table_and_in_the_file(load, monkeypatch, tmp_path, capsys):
    rows = [{"speed_up": 1.5, "format": "int8"}]
    monkeypatch.setattr(bench, "_break_even_rows", lambda options: rows)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    argv = ["bench", "break-even", "run", "--rollout", "a", "--sync", "b", "--json", str(tmp_path / "rows.json")]
    assert main(argv) == 0
    told, [row] = capsys.readouterr().out, json.loads((tmp_path / "rows.json").read_text())
    is_busy = load > 1
    assert ("busy before the start (load 900.0 on" in told) is is_busy
    assert row["speed_up"] == 1.5 and ("load_before" in row) is is_busy and break_even is not None
