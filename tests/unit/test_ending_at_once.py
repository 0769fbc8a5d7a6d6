"""A stage that leaves nothing behind ends at once, whatever swallows interrupts in it."""

import signal
import subprocess
import sys

import pytest

SWALLOWING = """
import time
from qurl.processes import ending_at_once
with ending_at_once():
    print("in it", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_though_interrupts_are_swallowed(number):
    process = subprocess.Popen([sys.executable, "-c", SWALLOWING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in it\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == "interrupted\n" and process.returncode == 130


def test_handlers_are_as_before_afterwards():
    from qurl.processes import ending_at_once

    before = signal.getsignal(signal.SIGINT)
    with ending_at_once():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
