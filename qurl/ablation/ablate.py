"""The driver of `qurl ablation`: check, run, evaluate the policies, write the page."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qurl.ablation.outcomes import Outcomes
from qurl.ablation.schedule import run_trials
from qurl.ablation.summary import Result
from qurl.ablation.trials import ARMS, Trial, plan_trials
from qurl.config.compose import compose
from qurl.config.validate import validate
from qurl.errors import ConfigError
from qurl.observability.run_data import load_runs

OWNED = ("run_name", "output_dir", "seed", "quantization", "algorithm.correction.name")
"""Keys that the ablation sets itself."""

Progress = Callable[[str, int, int], None]
"""Called with what is under way, runs done, runs in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """What to compare. overrides: of `qurl train`, the recipe among them."""

    overrides: Sequence[str]
    out: Path
    formats: Sequence[str]
    arms: Sequence[str] = tuple(ARMS)
    seeds: Sequence[int] = (0, 1, 2)
    num_jobs: int = 1

    def train_command(self, trial: Trial) -> list[str]:
        """The process of one run."""
        train = [sys.executable, "-m", "qurl.cli.main", "train", "logging.console=false"]
        return [*train, *self.overrides, *trial.overrides(str(self.out))]

    @property
    def command(self) -> str:
        """What a person types to repeat it."""
        options = ["--formats", *self.formats, "--seeds", *map(str, self.seeds)]
        options += [] if tuple(self.arms) == tuple(ARMS) else ["--arms", *self.arms]
        return shlex.join(["qurl", "ablation", *self.overrides, *options, "--jobs", str(self.num_jobs), "--out", str(self.out)])


def run_ablation(ablation: Ablation, progress: Progress) -> Path:
    """Run what is missing and write <out>/index.html; returns its path.

    Raises ConfigError before any run starts where one of them could not, KeyboardInterrupt after a signal, RuntimeError where a run
    fails. The same command goes on from there."""
    trials = plan_trials(ablation.arms, ablation.formats, ablation.seeds)
    _check(ablation, trials)
    ablation.out.mkdir(parents=True, exist_ok=True)
    outcomes = Outcomes(ablation.out, {"overrides": list(ablation.overrides)})

    def tell(what: str, is_done: Callable[[Trial], bool]) -> None:
        progress(what, sum(map(is_done, trials)), len(trials))

    def trained() -> None:
        tell("train", lambda trial: outcomes.get(trial.run_name) is not None)

    trained()
    asyncio.run(run_trials(trials, ablation.train_command, ablation.out, outcomes, ablation.num_jobs, trained))
    for trial in trials:
        tell("evaluate", lambda trial: (known := outcomes.get(trial.run_name)) is not None and known.accuracy is not None)
        _evaluate(ablation.out / trial.run_name, outcomes, trial)
    return write(ablation, trials, outcomes)


def write(ablation: Ablation, trials: Sequence[Trial], outcomes: Outcomes) -> Path:
    """The page about the trials that have ended."""
    from qurl.ablation.page import write_page

    ended = [(trial, outcome) for trial in trials if (outcome := outcomes.get(trial.run_name)) is not None]
    runs = load_runs([ablation.out / trial.run_name for trial, _ in ended])
    results = [Result(trial=trial, outcome=outcome, run=run) for (trial, outcome), run in zip(ended, runs, strict=True)]
    path = ablation.out / "index.html"
    write_page(results, ablation.formats, ablation.command, path)
    return path


def _check(ablation: Ablation, trials: Sequence[Trial]) -> None:
    """Compose and plan every trial of the first seed. Raises ConfigError."""
    from qurl.plan import make_plan

    if ablation.num_jobs < 1 or not trials:
        raise ConfigError(f"--jobs {ablation.num_jobs} and {len(trials)} runs: at least one of each is needed")
    for override in ablation.overrides:
        if override.partition("=")[0] in OWNED:
            raise ConfigError(f"{override}: the ablation sets this key itself; use --formats, --arms, --seeds and --out")
    for trial in trials:
        if trial.seed == ablation.seeds[0]:
            config = compose([*ablation.overrides, *trial.overrides(str(ablation.out))])
            validate(config)
            if config.learner.num_ranks > 1:
                raise ConfigError(
                    f"learner.num_ranks={config.learner.num_ranks}: an ablation evaluates its policies on one rank; use 1"
                )
            if not config.data.eval:
                raise ConfigError("data.eval is empty: an ablation compares held-out accuracy; name a dataset")
            make_plan(config)


def _evaluate(run_dir: Path, outcomes: Outcomes, trial: Trial) -> None:
    """Fill the accuracy of a run that has a checkpoint and none yet."""
    outcome = outcomes.get(trial.run_name)
    assert outcome is not None
    if outcome.accuracy is not None or not (run_dir / "checkpoints" / "latest").exists():
        return
    from qurl.ablation.policy import full_precision_accuracy

    with (run_dir / "evaluate.txt").open("w") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        accuracy = full_precision_accuracy(run_dir)
    outcomes.put(trial.run_name, replace(outcome, accuracy=accuracy))
