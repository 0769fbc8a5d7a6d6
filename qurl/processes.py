"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Called by a child as early as it can: on Linux the kernel kills it when its parent ends, however that ends, even inside a C
    call that never returns. Exits where the parent is already gone.

    parent: the pid that started the child, as the parent told it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        raise SystemExit(1)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process with exit code 130, for stages that leave nothing behind. A KeyboardInterrupt that comes
    while modules are imported may be swallowed by one of them."""

    def end(number: int, frame: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(130)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
