"""The process that runs the reward function: `python -m qurl.rewards.worker <fd of its connection> <pid of its parent>`.

It serves one response at a time on its main thread and knows no time limit; the pool kills it. It must not outlive the pool: on
Linux the kernel kills it with the parent, even inside a C call that never returns; elsewhere it ends when it reads the closed
connection."""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from qurl.config import RewardConfig
from qurl.plug import resolve
from qurl.processes import die_with_parent
from qurl.rewards import REWARDS
from qurl.rewards.binding import KEY, Score, bind
from qurl.types import Prompt, RewardResult

MAX_MESSAGE_CHARACTERS = 500
MAX_CPU_S = 2  # of a call of qurl's own verifiers, which bound their effort themselves; the kernel ends what slips through


def main() -> None:
    """Load the function, say so, then answer until the connection closes.

    Receives (config, sys.path), sends an error or None; then receives (response, prompt, finish reason) and sends a RewardResult
    per response."""
    connection = Connection(int(sys.argv[1]))
    die_with_parent(int(sys.argv[2]))
    _be_the_one_to_go()
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    with contextlib.suppress(EOFError, BrokenPipeError):
        config, sys.path[:] = connection.recv()
        try:
            score = _load(config)
        except BaseException as error:  # trust boundary: a module may raise anything while it is imported
            text = str(error)
            connection.send(
                text if text.startswith("reward.") else f"{KEY}={config.function!r} cannot be loaded: {_describe(error)}"
            )
            return
        connection.send(None)
        while True:
            request = connection.recv()
            if config.function in REWARDS:
                _limit_cpu(MAX_CPU_S)
            connection.send(_call(score, *request))


def _load(config: RewardConfig) -> Score:
    function = resolve(REWARDS, config.function, KEY)
    is_builtin = config.function in REWARDS
    score = bind(function, config, is_builtin)
    if is_builtin:  # the first call loads libraries; not at the expense of a response's time limit
        function(response="</think>\\boxed{\\sum_{k=1}^{2} k-1}", ground_truth="2")
    return score


def _call(score: Score, response: str, prompt: Prompt, finish_reason: str) -> RewardResult:
    start = time.perf_counter()
    try:
        scored = score(response, prompt, finish_reason)
    except BaseException as raised:  # trust boundary: a verifier may raise anything, even SystemExit; each is reported
        return RewardResult(value=None, error=_describe(raised), elapsed_s=time.perf_counter() - start)
    return RewardResult(value=float(scored), elapsed_s=time.perf_counter() - start, parts=scored.parts)


def _limit_cpu(seconds: int) -> None:
    """Let the kernel end this process with SIGXCPU after `seconds` more of CPU time, whatever C code it is in.

    The kernel counts whole seconds, so the limit falls between `seconds` and one more."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + seconds, hard))


def _describe(error: BaseException) -> str:
    """One line of bounded length."""
    return " ".join(f"{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARACTERS].split())


def _be_the_one_to_go() -> None:
    """Where memory runs out, Linux kills a verifier rather than its driver."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    main()
