"""Trials as processes, a few at a time.

Consumes trials, produces outcomes; waits for the processes, woken by whichever ends first. SIGINT and SIGTERM are passed on: each
run ends after a checkpoint, and the same command goes on from there."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qurl.ablation.outcomes import Outcome, Outcomes
from qurl.ablation.trials import Trial
from qurl.errors import ConfigError

EXIT_DONE, EXIT_USER, EXIT_GUARD = 0, 2, 3

Command = Callable[[Trial], list[str]]
"""The process that runs a trial, or goes on with it; its exit code is that of `qurl train`."""


async def run_trials(
    trials: Sequence[Trial], command: Command, out: Path, outcomes: Outcomes, num_jobs: int, progress: Callable[[], None]
) -> None:
    """Run what has no outcome yet, `num_jobs` at a time; what a run says goes to <out>/<run_name>.txt. progress: called after each.

    Raises KeyboardInterrupt after a signal, ConfigError where a run refuses its configuration, RuntimeError where one fails."""
    left = iter([trial for trial in trials if outcomes.get(trial.run_name) is None])
    jobs: set[asyncio.subprocess.Process] = set()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end(number: signal.Signals) -> None:
        stop.set()
        for job in jobs:
            job.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end, number)
    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(num_jobs):
                tasks.create_task(_work(left, command, out, outcomes, jobs, stop, progress))
    except ExceptionGroup as group:
        raise group.exceptions[0] from group
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    if stop.is_set():
        raise KeyboardInterrupt


async def _work(
    left: Iterator[Trial],
    command: Command,
    out: Path,
    outcomes: Outcomes,
    jobs: set[asyncio.subprocess.Process],
    stop: asyncio.Event,
    progress: Callable[[], None],
) -> None:
    for trial in left:
        start = time.monotonic()
        with (out / f"{trial.run_name}.txt").open("ab") as output:
            job = await asyncio.create_subprocess_exec(*command(trial), stdout=output, stderr=output)
            jobs.add(job)
            try:
                code = await job.wait()
            finally:  # cancelled where another trial failed: this one ends after a checkpoint
                if job.returncode is None:
                    job.send_signal(signal.SIGTERM)
                    await job.wait()
                jobs.discard(job)
        if stop.is_set():
            return
        said = _last_line(out / f"{trial.run_name}.txt")
        if code not in (EXIT_DONE, EXIT_GUARD):
            kind = ConfigError if code == EXIT_USER else RuntimeError
            raise kind(f"{trial.run_name}: {said.removeprefix('error: ')} (exit code {code}); its output is in {output.name}")
        outcomes.put(trial.run_name, Outcome(seconds=time.monotonic() - start, stopped=said if code == EXIT_GUARD else None))
        progress()


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"
