"""Command lines in processes that are forked from one which has imported what they need.

Interpreters and imports are most of what a run of a few seconds costs, and a suite starts dozens. `executable` is what Ray starts
its workers with: see warm.py."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = ["qurl.cli.train", "qurl.trainer.run", "qurl.trainer.start", "transformers.models.auto.tokenization_auto", "ray"]
START = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", "RAY_AUTH_MODE": "disabled"}
"""Read when torch and Ray are imported, whatever a test of the same process has left in its environment."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOADED)


class Forked:
    """`qurl` with some arguments, as far as tests use a Popen. Output, errors included, goes to the file `output`."""

    def __init__(
        self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], output: Path, executable: Path
    ) -> None:
        self.output = output
        before = {name: os.environ.get(name) for name in START}
        os.environ.update(START)  # for the server, which the first process starts
        given = (list(arguments), str(folder), {**environment, **START}, str(output), str(executable))
        self._process = _server.Process(target=_run, args=given)
        self._process.start()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

    @property
    def returncode(self) -> int | None:
        """None while it lives; minus the signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """Raises TimeoutExpired; the process lives on."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.output.name, timeout or 0.0, self.output.read_text())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Its output, once it has ended."""
        self.wait(timeout)
        return self.output.read_text(), None


def _run(arguments: list[str], folder: str, environment: dict[str, str], output: str, executable: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.executable = executable
    with open(output, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from qurl.cli.main import main

    sys.exit(main(arguments))
