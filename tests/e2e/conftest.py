"""What the end-to-end tests share: a tiny model, toy problems and a way to run the command line in a process of its own."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from forked import Forked
from warm import WarmWorkers

_numbers = itertools.count()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A folder with `tiny/` (a random two-layer model) and `sums.jsonl`."""
    from qurl.warmstart.model import make_tiny_model

    folder = tmp_path_factory.mktemp("workspace")
    make_tiny_model(folder / "tiny", seed=0)
    pairs = itertools.islice(itertools.product(range(10), range(10)), 40)
    rows = [{"problem": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def warm_workers(tmp_path_factory) -> Iterator[WarmWorkers]:
    workers = WarmWorkers(tmp_path_factory.mktemp("warm"))
    yield workers
    workers.close()


@dataclass(frozen=True)
class CommandLine:
    """`qurl` started in the workspace; every process carries a mark, so that tests find its children and nobody else's."""

    folder: Path
    mark: str
    workers: WarmWorkers

    def start(self, *args: str, **env: str) -> Forked:
        output = self.folder / f"output-{next(_numbers)}.txt"
        environment = {**os.environ, "QURL_TEST_MARK": self.mark, **self.workers.environment, **env}
        return Forked(args, self.folder, environment, output, self.workers.executable)

    def run(self, *args: str, **env: str) -> tuple[int, str]:
        process = self.start(*args, **env)
        output, _ = process.communicate(timeout=300)
        return process.wait(), output

    def train(self, name: str, *overrides: str, command: str = "train") -> tuple[str, ...]:
        """Arguments of a run of a few seconds whose rewards vary."""
        return (
            command, f"run_name={name}", "model.path=tiny", "data.train.path=sums.jsonl", "data.max_prompt_tokens=16",
            "quantization=int8", "rollout.num_prompts_per_step=4", "rollout.num_samples_per_prompt=4",
            "rollout.max_response_tokens=24", self.reward("token_parity"), "learner.learning_rate=1e-3",
            "learner.num_mini_batches=2", "checkpoint.every_steps=1", "sync.audit_layers=3", "num_steps=4", *overrides,
        )  # fmt: skip

    def reward(self, name: str) -> str:
        """Override that names the function of a file in rewards/."""
        return f"reward.function={Path(__file__).parent / 'rewards' / name}.py:score"

    def metrics(self, name: str) -> list[dict[str, float]]:
        """Of the iterations that a run has logged so far."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        whole, _, _ = path.read_text().rpartition("\n") if path.exists() else ("", "", "")
        return [json.loads(line) for line in whole.splitlines()]

    def assert_nothing_is_left(self) -> None:
        """No living process carries the mark of this test, or soon none does."""
        deadline = time.monotonic() + 30
        while left := self._left_over():
            assert time.monotonic() < deadline, left
            time.sleep(0.1)

    def _left_over(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("QURL_TEST_MARK") == self.mark:
                    found.append(" ".join(process.cmdline()))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


def wait_until(holds: Callable[[], bool], process: Forked) -> None:
    """Look again and again, as long as the process lives."""
    deadline = time.monotonic() + 200
    while not holds():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def command_line(workspace, warm_workers, request) -> CommandLine:
    return CommandLine(folder=workspace, mark=request.node.name, workers=warm_workers)
