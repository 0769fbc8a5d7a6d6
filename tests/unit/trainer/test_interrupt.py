"""The first signal asks, the second one insists."""

import asyncio
import gc
import os
import signal
import threading

import pytest

from qurl.trainer.interrupt import ECHO_S, Interrupted, held_signals, on_signal, or_interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_is_waited_for_and_a_second_one_cancels_the_run(number):
    cleaned = []

    async def run():
        interrupt = asyncio.Event()
        on_signal(interrupt)
        try:
            os.kill(os.getpid(), number)
            with pytest.raises(Interrupted):
                await or_interrupt(asyncio.Event().wait(), interrupt)
            os.kill(os.getpid(), number)  # the echo of the first
            await asyncio.sleep(ECHO_S + 0.1)
            cleaned.append("still running")
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        finally:
            cleaned.append("torn down")

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert cleaned == ["still running", "torn down"]


def test_what_is_done_wins_over_an_interrupt_and_an_error_passes():
    async def run():
        interrupt = asyncio.Event()
        assert await or_interrupt(asyncio.sleep(0, 5), interrupt) == 5
        failed = asyncio.get_running_loop().create_future()
        failed.set_exception(RuntimeError("full"))
        interrupt.set()
        with pytest.raises(RuntimeError, match="full"):
            await or_interrupt(failed, interrupt)

    asyncio.run(run())


def test_a_cancelled_caller_leaves_nothing_running_and_no_error_unheard(caplog):
    ended = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def play():
        caller = asyncio.ensure_future(or_interrupt(asyncio.gather(work(), work()), asyncio.Event()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert ended == [True, True]

    asyncio.run(play())
    gc.collect()  # asyncio complains of an exception that nobody asked for when its future is collected
    assert caplog.text == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_before_the_loop_takes_signals_is_kept_for_it(number):
    """Beside a thread that waits, which the system may interrupt in place of the main one."""
    done = threading.Event()
    threading.Thread(target=done.wait).start()

    async def run():
        interrupt = asyncio.Event()
        os.kill(os.getpid(), number)  # kept: neither an exception here nor the end of the process
        on_signal(interrupt)
        with pytest.raises(Interrupted):
            await or_interrupt(asyncio.Event().wait(), interrupt)

    try:
        with held_signals():
            asyncio.run(run())
    finally:
        done.set()


def test_a_signal_that_no_loop_took_is_delivered_in_the_end():
    with pytest.raises(KeyboardInterrupt), held_signals():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
