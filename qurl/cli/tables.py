"""Tables of numbers that fit the terminal: what is too wide goes on below, under the same first columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence

PIPE_WIDTH = 200
"""Characters of a line where nothing says how wide the reader is."""
MARGIN = 3
"""Characters that a column takes beside its content, at most."""


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], keys: Collection[str] = ()) -> None:
    """Print rows under their columns, in as many tables as the width needs; keys: columns that each of them begins with."""
    import os

    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    width = console.width if console.is_terminal or "COLUMNS" in os.environ else PIPE_WIDTH
    widths = [_width(column, [row[i] for row in rows]) for i, column in enumerate(columns)]
    first = [i for i, column in enumerate(columns) if column in keys]
    for chosen in folded(widths, first, width):
        table = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False)
        for i in chosen:
            table.add_column(columns[i], width=widths[i], overflow="fold")
        for row in rows:
            table.add_row(*(row[i] for i in chosen))
        Console(width=width).print(table)


def _width(title: str, cells: Sequence[str]) -> int:
    """No cell is broken; a title is, between words."""
    return max(map(len, [*cells, *title.split()]))


def folded(widths: Sequence[int], first: Sequence[int], width: int) -> list[list[int]]:
    """Columns of each table, in order. widths: of every column; first: those that come in all tables; width: of the terminal.

    Every table has one other column at least, however narrow the terminal.

    Example: folded([4, 9, 9, 9], [0], 30) is [[0, 1], [0, 2], [0, 3]]."""
    room = width - sum(widths[i] + MARGIN for i in first)
    tables: list[list[int]] = []
    left = 0
    for i in (i for i in range(len(widths)) if i not in first):
        if not tables or widths[i] + MARGIN > left:
            tables.append([*first])
            left = room
        tables[-1].append(i)
        left -= widths[i] + MARGIN
    return tables or [[*first]]
