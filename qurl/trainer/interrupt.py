"""Ctrl-C and SIGTERM: asked once, the run ends in order; asked twice, at once."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_S = 0.5
_held: list[signal.Signals] = []  # came before a loop took them


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; the run ends, after a checkpoint where there is something to save."""


@contextmanager
def held_signals() -> Iterator[None]:
    """Keep what comes until `on_signal` takes it; else a Ctrl-C that comes while modules are imported may be lost in one of them.

    Handlers are those of Python, which run in the main thread whichever thread the system interrupts."""
    before = {number: signal.signal(number, lambda number, frame: _held.append(signal.Signals(number))) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        _take(signal.raise_signal)


def _take(handle: Callable[[signal.Signals], None]) -> None:
    """Pass on what was kept."""
    while _held:
        handle(_held.pop(0))


def on_signal(interrupt: asyncio.Event) -> None:
    """The first signal sets `interrupt`; the next one cancels the calling task, so that what it started is still torn down.

    `timeout` and batch systems signal the process and then its group, so what follows within ECHO_S is still the first one.
    Call it again after ray.init, which puts a handler of its own in place."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    asked = -math.inf

    def ask(number: signal.Signals) -> None:
        nonlocal asked
        if interrupt.is_set():
            if time.monotonic() - asked > ECHO_S:
                task.cancel()
            return
        asked = time.monotonic()
        interrupt.set()
        logger.warning("%s: ending the run in order; once more ends it without a checkpoint", number.name)

    for number in SIGNALS:
        loop.add_signal_handler(number, ask, number)
    _take(ask)


async def or_interrupt(awaitable: Awaitable[T], interrupt: asyncio.Event) -> T:
    """The result, or Interrupted if that comes first (what was awaited is cancelled)."""
    work = asyncio.ensure_future(awaitable)
    stop = asyncio.ensure_future(interrupt.wait())
    try:
        await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
    finally:
        stop.cancel()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)  # also where the caller is cancelled: what it awaited has ended then
    raise Interrupted
