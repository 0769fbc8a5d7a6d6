"""Files of rows: which there are behind a path, and their rows as stored. Nothing here knows what a column means.

A reader yields `(place, row)`; the place ("line 3", "row 2 counting from 0") is what an error about that row names. A byte order
mark, CRLF line ends and blank lines are read as if absent; a NUL byte means a half-written file and is refused."""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

Rows = Iterator[tuple[str, Any]]

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Suffix of a compressed text file -> what opens it."""

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
NUM_BATCH_ROWS = 32  # of a parquet or Arrow file, decoded at a time: rows of 3 MB stay below 100 MB
GLOB_CHARACTERS = "*?["


def files_of(path: str, label: str) -> list[Path]:
    """Return the file that `path` names, or the files of a pattern such as shards/*.parquet in the order of their names.

    ValueError where there is none, or where it is a folder or of a kind that no reader knows."""
    file = Path(path).expanduser()
    if file.exists() or not any(character in path for character in GLOB_CHARACTERS):
        _check_file(file, label)
        return [file]
    matches = [Path(name) for name in sorted(glob.glob(str(file), recursive=True)) if Path(name).is_file()]
    if not matches:
        raise ValueError(f"{label}: no file matches the pattern (the current folder is {Path.cwd()})")
    for match in matches:
        _check_file(match, f"{label} {match}")
    return matches


def _check_file(file: Path, label: str) -> None:
    if file.is_dir():
        suffixes = sorted({kind for entry in file.iterdir() if (kind := kind_of(entry)[0]) in READERS})
        shards = f", or {file / f'*{suffixes[0]}'} for all of its {suffixes[0]} files" if suffixes else ""
        raise ValueError(f"{label}: it is a folder; name a file in it{shards}")
    suffix, compression = kind_of(file)
    if suffix not in READERS or (compression and suffix not in TEXT_READERS):
        found = file.suffix if suffix not in READERS else f"{suffix}{compression}"
        hint = f"unpack it: {suffix} files are compressed inside; " if suffix in READERS else ""
        raise ValueError(
            f"{label}: suffix {found!r} is not supported; {hint}use {', '.join(READERS)}, or text with .gz, .bz2, .xz"
        )
    if not file.is_file():
        raise ValueError(f"{label}: no such file (the current folder is {Path.cwd()})")


def kind_of(path: Path) -> tuple[str, str]:
    """Return (suffix that says the format, suffix that says the compression or ""), in lower case.

    Example:
        >>> kind_of(Path("a/train.jsonl.GZ")), kind_of(Path("a.parquet"))
        (('.jsonl', '.gz'), ('.parquet', ''))
    """
    suffix = path.suffix.lower()
    return (path.with_suffix("").suffix.lower(), suffix) if suffix in OPENERS else (suffix, "")


def read_file(path: Path, label: str) -> Rows:
    """Yield the rows of a file, by its suffix. ValueError, which begins with `label`, where it cannot be read."""
    try:
        yield from READERS[kind_of(path)[0]](path, label)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{label}: the compressed file is damaged ({error})") from error
    except OSError as error:
        if (
            isinstance(error, gzip.BadGzipFile) or error.errno is None
        ):  # bz2 says "Invalid data stream" without a number
            raise ValueError(f"{label}: the compressed file is damaged ({error})") from error
        raise ValueError(f"{label}: the file cannot be read ({error.strerror})") from error


def _open(path: Path) -> IO[bytes]:
    opener = OPENERS.get(kind_of(path)[1])
    opened: IO[bytes] = path.open("rb") if opener is None else opener(path, "rb")
    return opened


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that stands twice in an object, of which JSON would take the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in one object"
        )
    return found


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        hint = "; a list of rows over several lines belongs in a .json file" if text.strip() == "[" else ""
        raise ValueError(
            f"{place}: not JSON ({error.msg} at column {error.colno}): {text[:80]!r}{hint}"
        ) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # an integer of thousands of digits; nesting beyond the interpreter's stack
        raise ValueError(f"{place}: not usable JSON ({error})") from error


def _decode(data: bytes, place: str) -> str:
    if data.startswith(UTF16_MARKS):
        raise ValueError(
            f"{place}: the file is UTF-16; save it as UTF-8, e.g. iconv -f UTF-16 -t UTF-8 OLD > NEW"
        )
    if b"\0" in data:
        if data[1::2].count(0) > len(data) // 4 or data[::2].count(0) > len(data) // 4:
            raise ValueError(
                f"{place}: NUL in every other byte, so the file is UTF-16; save it as UTF-8, e.g. with iconv"
            )
        raise ValueError(f"{place}: NUL byte; the file is damaged or was not written to its end")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}); convert it"
        ) from error


def _strip_mark(data: bytes) -> bytes:
    return data.removeprefix(b"\xef\xbb\xbf")


def _read_jsonl(path: Path, label: str) -> Rows:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            place = f"line {number}"
            data = _strip_mark(line) if number == 1 else line
            if data.strip():
                yield place, _parse(_decode(data.rstrip(b"\r\n"), f"{label} {place}"), f"{label} {place}")


def _read_json(path: Path, label: str) -> Rows:
    with _open(path) as file:
        text = _decode(_strip_mark(file.read()), label)
    if not text.strip():
        return
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        hint = "; one object per line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        raise ValueError(
            f"{label} line {error.lineno}: not JSON ({error.msg} at column {error.colno}){hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{label}: not usable JSON ({error})") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        found = (
            f"an object with keys {', '.join(content)}"
            if isinstance(content, dict)
            else f"a {type(content).__name__}"
        )
        raise ValueError(f'{label}: found {found}; use a list of rows or {{"data": [rows]}}')
    yield from numbered(rows)


def _read_csv(path: Path, label: str) -> Rows:
    """Columns are named by the first line; every value is text, as it stands there."""
    with _open(path) as file:
        text = _decode(_strip_mark(file.read()), label)
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter="\t" if kind_of(path)[0] == ".tsv" else ",", strict=True
    )
    try:
        names = next(reader, [])
        _check_columns(names, f"{label} line 1")
        for values in reader:
            if values and len(values) != len(names):
                raise ValueError(
                    f"{label} line {reader.line_num}: {len(values)} values for the {len(names)} columns of line 1"
                )
            if values:
                yield f"line {reader.line_num}", dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise ValueError(f"{label} line {reader.line_num}: not CSV ({error})") from error


def _check_columns(names: list[str], label: str) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{label}: the column {twice[0]!r} stands there twice; rename one")


def _read_parquet(path: Path, label: str) -> Rows:
    from pyarrow import ArrowException, ArrowNotImplementedError
    from pyarrow.parquet import ParquetFile

    done = 0
    try:
        for num_rows in (NUM_BATCH_ROWS, 1):
            with ParquetFile(path) as file:
                _check_columns(file.schema_arrow.names, label)
                try:
                    for row in _rows_after(done, file.iter_batches(num_rows)):
                        yield f"row {done} counting from 0", row
                        done += 1
                    return
                except ArrowNotImplementedError:  # nested columns of more than 2 GiB in a batch
                    if num_rows == 1:
                        raise
    except ArrowException as error:
        raise ValueError(f"{label}: not a readable parquet file ({error})") from error


def _rows_after(num_done: int, batches: Any) -> Iterator[Any]:
    for batch in batches:
        skipped = min(num_done, batch.num_rows)
        num_done -= skipped
        yield from batch.slice(skipped).to_pylist()


def _read_arrow(path: Path, label: str) -> Rows:
    """Arrow's file format (Feather 2) and its stream format, which `datasets` caches in."""
    from pyarrow import ArrowException, ArrowInvalid, ipc, memory_map

    try:
        with memory_map(str(path)) as source:
            try:
                opened: Any = ipc.open_file(source)
                batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
            except ArrowInvalid:
                source.seek(0)
                batches = opened = ipc.open_stream(source)
            _check_columns(opened.schema.names, label)
            parts = (
                batch.slice(start, NUM_BATCH_ROWS)
                for batch in batches
                for start in range(0, batch.num_rows, NUM_BATCH_ROWS)
            )
            yield from numbered(row for part in parts for row in part.to_pylist())
    except ArrowException as error:
        raise ValueError(f"{label}: not a readable Arrow file ({error})") from error


def numbered(rows: Any) -> Rows:
    """Yield rows with their positions as places."""
    for index, row in enumerate(rows):
        yield f"row {index} counting from 0", row


TEXT_READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv
}  # fmt: skip
READERS = {**TEXT_READERS, ".parquet": _read_parquet, ".arrow": _read_arrow, ".feather": _read_arrow}
