"""`qurl plan` prints and leaves nothing behind."""

from pathlib import Path

import pytest

from qurl.cli.main import main


def test_plan_prints_tables_and_starts_nothing(
    needed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", *needed]) == 0
    told = capsys.readouterr().out
    for line in ("32 prompts x 8 = 256", "14 of 15 linear layers to int8", "100 iterations"):
        assert line in told
    assert list(tmp_path.iterdir()) == []
