"""Tables that fold."""

import pytest

from qurl.cli.tables import folded, print_table

COLUMNS = ["format", "bits", "NMSE weights", "NMSE activations", "perplexity", "increase", "divergence", "divergence / nvfp4's"]
ROW = ["lobcq:books@16", "4.625", "0.8516 %", "0.8516 %", "123.456", "1.234 +- 0.056", "0.012345", "0.512 +- 0.034"]


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_a_table_fits_the_terminal_and_loses_nothing(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(COLUMNS, [ROW, ROW], ("format",))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert all(text.count(cell) >= 2 for cell in ROW)  # whole, in both rows
    tables = text.count("format")
    assert text.count(ROW[0]) == 2 * tables and tables == (1 if width >= 120 else 2)


def test_columns_are_folded_in_order_and_none_is_left_out():
    assert folded([4, 9, 9, 9], [0], 30) == [[0, 1], [0, 2], [0, 3]]
    assert folded([4, 9, 9, 9], [0], 32) == [[0, 1, 2], [0, 3]]
    assert folded([4, 90], [0], 20) == [[0, 1]] and folded([4], [0], 80) == [[0]]
    assert folded([5, 5, 5], [], 16) == [[0, 1], [2]]
