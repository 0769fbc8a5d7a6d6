"""Rows too large to keep in memory: the tests of a programming problem take some MB, and a data set has tens of thousands of them.

A large row goes to a compressed temporary file (in $TMPDIR) that ends with the process. What stands for it is a mapping that reads
the row when a column is asked for. Pickled to a process that scores answers it costs a few bytes and arrives as a plain dict."""

from __future__ import annotations

import pickle
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_KEPT_BYTES = 16 << 10  # of a pickled row; a larger one goes to the file
LEVEL = 1  # of zlib: the quickest


class Spill:
    """A temporary file of rows, removed once nobody refers to it or one of its rows."""

    def __init__(self) -> None:
        """Create nothing until there is a large row."""
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._size = 0

    def kept(self, *mappings: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
        """Return the mappings, which may share values, or what reads them from the file where they are large together."""
        data = pickle.dumps(mappings, protocol=pickle.HIGHEST_PROTOCOL)
        if len(data) <= MAX_KEPT_BYTES:
            return mappings
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="qurl-rows-", ignore_cleanup_errors=True)
        path, start, packed = Path(self._folder.name) / "rows", self._size, zlib.compress(data, LEVEL)
        with path.open("ab") as file:
            file.write(packed)
        self._size += len(packed)
        return tuple(
            SpilledRow(self._folder, path, start, len(packed), part, tuple(mapping))
            for part, mapping in enumerate(mappings)
        )


class SpilledRow(Mapping[str, Any]):
    """A mapping whose values lie in a file. Unpickled it is a dict."""

    def __init__(
        self, folder: Any, path: Path, start: int, size: int, part: int, names: tuple[str, ...]
    ) -> None:
        """folder: what must live as long as this."""
        self._folder, self._place, self._names = folder, (str(path), start, size, part), names

    def __getitem__(self, name: str) -> Any:
        """Read the row. KeyError for a name that it lacks."""
        if name not in self._names:
            raise KeyError(name)
        return load(*self._place)[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names, without reading anything."""
        return iter(self._names)

    def __len__(self) -> int:
        """The number of names."""
        return len(self._names)

    def loaded(self) -> dict[str, Any]:
        """Return all of it as a dict, read at once."""
        return load(*self._place)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the place in the file."""
        return load, self._place


def load(path: str, start: int, size: int, part: int) -> dict[str, Any]:
    """Return one mapping of a stored row."""
    with open(path, "rb") as file:
        file.seek(start)
        row: tuple[dict[str, Any], ...] = pickle.loads(zlib.decompress(file.read(size)))
    return row[part]
