"""The folder of an evaluation, which survives its process.

    config.json      what was asked for, once a problem is finished; another command in the same folder is refused then
    problems.jsonl   a line per finished problem, on disk before the problem counts as done
    results.json     written at the end, from problems.jsonl alone
    model/           of a run folder: the exported checkpoint

A process that is killed while it writes leaves half a line at the end; it is cut off and the problem sampled again, with the same
seeds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from qurl.errors import ConfigError
from qurl.evaluation.record import ProblemRecord
from qurl.locks import only_process

CONFIG, PROBLEMS, RESULTS = "config.json", "problems.jsonl", "results.json"


class Journal:
    """Context manager: creates the folder, holds its lock, reads what is done. `done` maps (benchmark, problem) to its record.

    Raises ConfigError where another process writes there, the folder was begun with another configuration, or a line is damaged."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        """config: JSON values by option."""
        self.folder = folder
        self.done: dict[tuple[str, str], ProblemRecord] = {}
        self._config = dict(config)
        self._file: BinaryIO | None = None
        self._held = ExitStack()

    def __enter__(self) -> Journal:
        refusal = f"--out {self.folder}: another process evaluates there; use another folder"
        with ExitStack() as stack:
            try:
                stack.enter_context(only_process(self.folder / ".lock", refusal))
            except OSError as error:
                raise ConfigError(f"--out {self.folder} cannot be written ({error.strerror})") from error
            self._check_config()
            self._file = stack.enter_context((self.folder / PROBLEMS).open("ab+"))
            self._read()
            self._held = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._held.close()
        if not self.done:  # what did not start must not stand in the way of another command
            with suppress(OSError):
                (self.folder / PROBLEMS).unlink()
                self.folder.rmdir()

    def append(self, record: ProblemRecord) -> None:
        """Put a finished problem on disk."""
        assert self._file is not None, "the journal is open"
        if not self.done:
            self._write_config()
        self._file.write(json.dumps(asdict(record)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done[record.benchmark, record.problem] = record

    def write_results(self, results: Mapping[str, Any]) -> Path:
        """Replace results.json; returns its path."""
        path, partial = self.folder / RESULTS, self.folder / f".{RESULTS}"
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.replace(path)
        return path

    def _check_config(self) -> None:
        """Refuse a configuration that differs from the one on disk."""
        path = self.folder / CONFIG
        if not path.exists():
            return
        try:
            before = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} is damaged; use another --out, or remove the folder") from error
        if "benchmarks" not in before:
            raise ConfigError(f"--out {self.folder} is no folder of an evaluation, but has a {CONFIG}; use another")
        now = json.loads(json.dumps(self._config))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) == now.get(key):
                continue
            if key == "problems":  # hashes, which say nothing to a person
                stored, found = before.get(key) or {}, now.get(key) or {}
                changed = ", ".join(name for name in sorted(stored | found) if stored.get(name) != found.get(name))
                raise ConfigError(
                    f"--out {self.folder}: {changed} asks other problems there or words them otherwise (data, prompt, template or "
                    "tokenizer changed); use another --out"
                )
            raise ConfigError(
                f"{key}={now.get(key)}: the evaluation in {self.folder} was started with {before.get(key)}; "
                "go on with the same arguments or use another --out"
            )

    def _write_config(self) -> None:
        partial = self.folder / f".{CONFIG}"
        partial.write_text(json.dumps(self._config, indent=1) + "\n")
        partial.replace(self.folder / CONFIG)

    def _read(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        whole = 0  # bytes of complete lines
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = ProblemRecord(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{self.folder / PROBLEMS} line {number} is damaged; remove the line or the folder") from error
            self.done[record.benchmark, record.problem] = record
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)
