"""Rewards in processes that can be killed.

A verifier reads text that a policy wrote, so sooner or later it hangs, exhausts memory or takes its process down. A thread cannot
be stopped and a signal does not reach C code, so every response is scored in a worker process that serves one at a time. One that
exceeds the time limit or dies costs an error for its own response and is replaced; no other response is touched.

A thread of the driver stands beside each worker and waits for it, so that a busy event loop never looks like a slow verifier."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isfinite
from multiprocessing.connection import Connection, Pipe

from qurl.config import RewardConfig
from qurl.rewards.forms import WRONG
from qurl.types import Prompt, RewardResult, Rollout, RolloutGroup, ScoredGroup

START_TIMEOUT_S = 120.0  # to import the reward function's module


class RewardPool:
    """`reward.num_workers` processes that score responses; the order of calls is start, score (concurrently), close."""

    def __init__(self, config: RewardConfig) -> None:
        """ValueError for limits that make no sense; starts nothing."""
        if config.num_workers < 1:
            raise ValueError(f"reward.num_workers={config.num_workers} cannot score; use at least 1")
        if not (config.timeout_s > 0 and isfinite(config.timeout_s)):
            raise ValueError(f"reward.timeout_s={config.timeout_s} is no time limit; use seconds > 0")
        self._workers = [_Worker(config) for _ in range(config.num_workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(config.num_workers, thread_name_prefix="reward")

    async def start(self) -> None:
        """Start the workers and load the function in each. ValueError where it cannot be loaded, RuntimeError where a process
        cannot be started; the pool is closed then."""
        loop = asyncio.get_running_loop()
        started = [loop.run_in_executor(self._threads, worker.start) for worker in self._workers]
        failures = [o for o in await asyncio.gather(*started, return_exceptions=True) if isinstance(o, BaseException)]
        if failures:
            await self.close()
            raise failures[0]
        for worker in self._workers:
            self._idle.put(worker)

    async def score(self, group: RolloutGroup) -> ScoredGroup:
        """A reward or an error per rollout, in their order. RuntimeError where a worker cannot be replaced or the pool closes."""
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(self._threads, self._score, rollout, group.prompt) for rollout in group.rollouts]
        return ScoredGroup(group=group, rewards=list(await asyncio.gather(*calls)))

    async def close(self) -> None:
        """Kill the workers; a score in progress raises RuntimeError."""
        for worker in self._workers:
            worker.close()
        await asyncio.to_thread(self._threads.shutdown)

    def _score(self, rollout: Rollout, prompt: Prompt) -> RewardResult:
        worker = self._idle.get()  # as many threads as workers: one is idle
        try:
            return worker.score(rollout.text, prompt, rollout.finish_reason)
        finally:
            self._idle.put(worker)


def check_reward_function(config: RewardConfig, samples: Sequence[Prompt] = ()) -> None:
    """Load the function in a worker of its own, since its module may do anything to the process that imports it, and score each of
    `samples` with its ground truth as the response.

    ValueError where the function cannot be found, has the wrong signature, raises, hangs or returns no finite number."""
    worker = _Worker(config)
    try:
        worker.start()
        for sample in samples:
            error = worker.score(sample.ground_truth, sample).error
            if error is not None:
                raise ValueError(
                    f"reward.function={config.function!r} fails on problem {sample.prompt_id} (data source {sample.data_source!r}, "
                    f"ground truth {sample.ground_truth[:80]!r}): {error}"
                )
    finally:
        worker.close()


def unpaid_indices(config: RewardConfig, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[int]:
    """Return the positions of the responses that get no positive reward, scored one after the other in one worker."""
    worker = _Worker(config)
    try:
        worker.start()
        pairs = zip(responses, prompts, strict=True)
        values = [worker.score(response, prompt).value for response, prompt in pairs]
    finally:
        worker.close()
    return [index for index, value in enumerate(values) if value is None or value <= 0]


class _Worker:
    """One process at a time, and its replacements. Called from one thread at a time, except for close."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._lock = threading.Lock()  # no process may start once closed
        self._is_closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def start(self) -> Connection:
        """Start a process and wait until it has loaded the function. ValueError where it cannot, RuntimeError once closed."""
        connection = self._start_process()
        label = f"reward.function={self._config.function!r}"
        try:
            connection.send((self._config, sys.path))
            if not connection.poll(START_TIMEOUT_S):
                self._lose()
                raise ValueError(f"{label} is not loaded after {START_TIMEOUT_S:g} s; does its module wait for something?")
            error = connection.recv()
        except (EOFError, OSError) as ended:
            raise ValueError(f"{label}: the process that loads it died ({self._lose()})") from ended
        if error is not None:
            self._lose()
            raise ValueError(error)
        return connection

    def score(self, response: str, prompt: Prompt, finish_reason: str = "stop") -> RewardResult:
        """The reward of one response, or why there is none. Raises what start raises where a lost process cannot be replaced.

        An answer at which a reward of qurl's own spends all CPU time it is given cannot be compared: it is wrong, not an error."""
        connection = self._send((response, prompt, finish_reason))
        begin = time.perf_counter()
        try:
            if connection.poll(self._config.timeout_s):
                result: RewardResult = connection.recv()
                return result
            self._lose()
            error = f"timeout after {self._config.timeout_s:g} s"
        except (EOFError, OSError):
            ending = self._lose()
            if ending == "signal SIGXCPU" and self._config.function in WRONG:
                return RewardResult(value=WRONG[self._config.function], elapsed_s=time.perf_counter() - begin)
            error = f"the worker process died ({ending})"
        return RewardResult(value=None, error=error, elapsed_s=time.perf_counter() - begin)

    def close(self) -> None:
        """Kill the process, from any thread; a call that waits for it raises RuntimeError."""
        with self._lock:
            self._is_closed = True
            self._kill()

    def _start_process(self) -> Connection:
        ours, theirs = Pipe()
        command = [sys.executable, "-m", "qurl.rewards.worker", str(theirs.fileno()), str(os.getpid())]
        with theirs, self._lock:
            self._check_open()
            self._kill()
            # a session of its own: Ctrl-C is the driver's to handle, and the group holds whatever the function starts
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2, start_new_session=True
            )
            self._connection = ours
        return ours

    def _send(self, request: tuple[str, Prompt, str]) -> Connection:
        """Hand a request to a living process. One that died while it had nothing to do is replaced and costs no error."""
        connection = self._connection
        if connection is None or connection.poll(0):  # an idle process says nothing: this is the end of its stream
            connection = self.start()
        try:
            connection.send(request)
        except OSError:
            connection = self.start()
            connection.send(request)
        return connection

    def _lose(self) -> str:
        """Make sure that the process is gone; how it ended, e.g. "signal SIGSEGV". RuntimeError where close ended it."""
        with self._lock:
            self._check_open()
            self._kill()
        assert self._process is not None
        code = self._process.returncode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def _kill(self) -> None:
        """Kill the process with whatever it started, and reap it; harmless where it already ended."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # what some systems say of one that just ended
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._connection = None

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the reward pool is closed")
