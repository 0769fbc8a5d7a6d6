"""token_parity, but its third call in the run kills a process: the one that QURL_TEST_VICTIM names.

Killing from a reward call puts the blow where it hurts: in the middle of an iteration, while other samples are under way."""

import os
import signal
from pathlib import Path

import psutil


def score(response: str, ground_truth: str, **extra) -> float:
    calls = Path(os.environ["QURL_TEST_CALLS"])
    with calls.open("a") as file:
        file.write(".")
    if calls.stat().st_size == 22:  # the second iteration: a dry call and sixteen calls before
        for process in psutil.process_iter():
            if _is_victim(process):
                process.send_signal(signal.SIGKILL)
    return float(sum(map(ord, response)) % 2)


def _is_victim(process: psutil.Process) -> bool:
    victim = os.environ["QURL_TEST_VICTIM"]  # "reward" or the class of a Ray actor, which Ray makes its process title
    if victim == "reward":
        return process.pid == os.getpid()
    forked = Path(os.environ["QURL_TEST_WARM_SOCKET"]).with_name(f"mark-{process.pid}")  # see warm.py
    try:
        marked = forked.exists() and forked.read_text() == os.environ["QURL_TEST_MARK"]
        return marked and f"ray::{victim}" in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
