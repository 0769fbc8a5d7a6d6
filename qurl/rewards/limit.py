"""A limit on the CPU time of a block of Python code."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


class OutOfTime(BaseException):
    """The block has used its CPU time; no `except Exception` inside it holds this back."""


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block once it has used `seconds` of this process's CPU time, and again while it goes on.

    It works in the main thread only, where the processes of the reward pool call it; elsewhere the block runs without a limit. It
    does not reach into C code."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"{seconds:g} s of CPU time are used up")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class Budget:
    """An amount of CPU time that several blocks share."""

    def __init__(self, seconds: float) -> None:
        self._left_s = seconds

    @contextlib.contextmanager
    def limit(self) -> Iterator[None]:
        """Let the block use what is left. OutOfTime where it needs more."""
        if self._left_s <= 0:
            raise OutOfTime("nothing is left")
        begin = time.process_time()
        try:
            with cpu_limit(self._left_s):
                yield
        finally:
            self._left_s -= time.process_time() - begin
