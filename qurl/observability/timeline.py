"""Where the time goes: spans for a trace viewer, and per step one number for each stage.

The accounting charges every moment of a step to the stage opened last among those still open, or to idle when none is. Stages may
nest or, between asyncio tasks, overlap: the numbers still add up to the step, and none of it is counted twice."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STAGES = ("rollout", "reward", "probe", "logprob", "update", "sync", "eval", "checkpoint")
END = "\n]\n"


class Timeline:
    """Writes Chrome trace JSON for Perfetto (ui.perfetto.dev) or chrome://tracing; one row per span name.

    Belongs to the driver's thread. The file is complete after every step, and a resumed run goes on in it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._pending = _read_events(path) or [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "qurl driver"}}]
        self._rows = {e["name"]: e["tid"] for e in self._pending if e["ph"] == "X"}
        path.write_text("[\n" + ",\n".join(map(json.dumps, self._pending)) + END, encoding="utf-8")
        self._pending = []
        self._epoch = time.time() - time.monotonic()  # trace timestamps are unix time
        self._open: list[str] = []
        self.begin_step(0)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record a span. A name from STAGES is also accounted to the step; any other only appears in the trace."""
        start = time.monotonic()
        if name in STAGES:
            self._charge(start)
            self._open.append(name)
        try:
            yield
        finally:
            end = time.monotonic()
            if name in STAGES:
                self._charge(end)
                self._open.remove(name)
            self._record(name, start, end)

    def add(self, start: float, timings: Mapping[str, float], total: float) -> None:
        """Account stages that another process measured during a call of ours, one after the other.

        start: time.monotonic() before the call. timings: seconds under the metric keys time/<stage>_s. total: seconds of the call;
        stages that claim more are scaled down to it, and what they leave stays where it was (idle, outside of any span)."""
        scale = min(1.0, total / max(sum(timings.values()), 1e-9))
        for key, seconds in timings.items():
            stage = key.removeprefix("time/").removesuffix("_s")
            self.move(self._charged_to, stage, seconds * scale)
            self._record(stage, start, start + seconds * scale)
            start += seconds * scale

    def move(self, source: str, target: str, seconds: float) -> None:
        """Account `seconds` of this step to another stage; no more than `source` has. KeyError for a name not in STAGES."""
        self._charge(time.monotonic())
        seconds = min(seconds, self._seconds[source])
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def begin_step(self, step: int) -> None:
        """Start accounting anew; stages still open go on."""
        self._step = step
        self._step_start = self._charged_until = time.monotonic()
        self._seconds = dict.fromkeys((*STAGES, "idle"), 0.0)

    def end_step(self) -> dict[str, float]:
        """time/step_s since begin_step, and time/<stage>_s and time/idle_s that add up to it; brings the file up to date."""
        now = time.monotonic()
        self._charge(now)
        self._record("step", self._step_start, now, step=self._step)
        self.write()
        return {"time/step_s": now - self._step_start, **{f"time/{name}_s": s for name, s in self._seconds.items()}}

    def write(self) -> None:
        """Append what is new to the file, which is complete JSON again afterwards."""
        with self._path.open("r+b") as file:
            file.seek(-len(END), os.SEEK_END)
            file.write(("".join(",\n" + json.dumps(e) for e in self._pending) + END).encode())
        self._pending = []

    @property
    def _charged_to(self) -> str:
        return self._open[-1] if self._open else "idle"

    def _charge(self, now: float) -> None:
        self._seconds[self._charged_to] += now - self._charged_until
        self._charged_until = now

    def _record(self, name: str, start: float, end: float, **args: Any) -> None:
        if name not in self._rows:
            self._rows[name] = len(self._rows) + 1
            self._pending.append({"ph": "M", "pid": 1, "tid": self._rows[name], "name": "thread_name", "args": {"name": name}})
        self._pending.append({
            "ph": "X", "pid": 1, "tid": self._rows[name], "name": name, "ts": round((self._epoch + start) * 1e6),
            "dur": round((end - start) * 1e6), "args": args,
        })  # fmt: skip


def _read_events(path: Path) -> list[dict[str, Any]]:
    """The whole events of an earlier process, one per line; a line cut short by a kill is dropped."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            event = json.loads(line.rstrip(","))
        except json.JSONDecodeError:
            continue  # "[", "]" or a torn line
        if isinstance(event, dict):
            events.append(event)
    return events
