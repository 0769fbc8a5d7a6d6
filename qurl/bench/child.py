"""A measuring process: OpenMP reads its settings when a process starts, and vLLM changes its host process for good.

A module that measures is run as `python -m MODULE PARENT FOLDER JOB`, where PARENT is the pid it dies with and JOB is JSON; it
writes RESULT into the folder, and says on standard output how many rounds of how many are done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULT = "result.json"
PROGRESS = "qurl-bench-progress"
"""Begins a line that says how many rounds of how many are done."""

Progress = Callable[[str, int, int], None]
"""Called with shape, rounds done, rounds in all."""


def measure_in_child(module: str, job: Mapping[str, Any], num_threads: int | None, progress: Progress) -> Any:
    """What `module` wrote for the job, whose "shape" progress is told. num_threads: default all cores. Raises RuntimeError with
    the end of the child's output where measuring failed."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(num_threads or len(os.sched_getaffinity(0))), "GOMP_SPINCOUNT": "1000",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_DEEP_GEMM": "0",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="qurl-bench-") as folder:
        command = [sys.executable, "-m", module, str(os.getpid()), folder, json.dumps(job)]
        log, result = Path(folder) / "stderr.txt", Path(folder) / RESULT
        with log.open("w") as stderr:
            child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith(PROGRESS):
                    done, total = map(int, line.split()[1:])
                    progress(str(job["shape"]), done, total)
        if child.wait() != 0 or not result.exists():
            raise RuntimeError(f"measuring {job['shape']} failed (exit code {child.returncode}): ...{log.read_text()[-2000:]}")
        return json.loads(result.read_text())


def check_known(what: str, asked: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError where something is asked for that does not exist, or nothing is."""
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        raise ValueError(f"{what} {unknown[0] if unknown else '(none)'!r} is unknown; use some of {', '.join(known)}")


def report(done: int, total: int) -> None:
    """Called by the child."""
    print(PROGRESS, done, total, flush=True)
