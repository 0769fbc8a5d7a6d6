"""Processes of trials: what their exit codes mean, and that an ended ablation goes on."""

import asyncio
import os
import signal
import sys

import pytest

from qurl.ablation.outcomes import Outcomes
from qurl.ablation.schedule import run_trials
from qurl.ablation.trials import plan_trials
from qurl.errors import ConfigError

TRIALS = plan_trials(["tis", "acr"], ["int8"], [0, 1])


def run(folder, code, num_jobs=2, asked="x"):
    """Each trial is `code` with its name in argv[1]; returns the names in the order in which they ended."""
    outcomes, ended = Outcomes(folder, {"overrides": asked}), []
    command = lambda trial: [sys.executable, "-S", "-c", code, trial.run_name]  # noqa: E731
    asyncio.run(run_trials(TRIALS, command, folder, outcomes, num_jobs, lambda: ended.append(1)))
    return outcomes, len(ended)


def test_each_trial_runs_once_and_not_again(tmp_path):
    code = f"import sys; open(r'{tmp_path}/ran', 'a').write(sys.argv[1] + '\\n')"
    outcomes, ended = run(tmp_path, code)
    assert ended == 4 and all(outcomes.get(trial.run_name).stopped is None for trial in TRIALS)
    assert sorted((tmp_path / "ran").read_text().split()) == sorted(trial.run_name for trial in TRIALS)
    assert run(tmp_path, "raise SystemExit(1)")[1] == 0
    with pytest.raises(ConfigError, match="holds an ablation with overrides x, now y"):
        run(tmp_path, code, asked="y")


def test_a_guard_is_a_result(tmp_path):
    outcomes, _ = run(tmp_path, "import sys; print('stopped: the loss is not finite'); sys.exit(3)")
    assert {outcomes.get(trial.run_name).stopped for trial in TRIALS} == {"stopped: the loss is not finite"}


@pytest.mark.parametrize(("code", "kind"), [(2, ConfigError), (1, RuntimeError), (-9, RuntimeError)])
def test_a_failure_ends_it_with_what_was_said_and_what_is_done_is_kept(tmp_path, code, kind):
    fails = f"import os, sys; print('error: broken'); sys.stdout.flush(); {{}} if sys.argv[1] != 'int8_acr_0' else {_end(code)}"
    with pytest.raises(kind, match=rf"int8_acr_0: broken \(exit code {code}\).*int8_acr_0.txt"):
        run(tmp_path, fails, num_jobs=1)
    outcomes = Outcomes(tmp_path, {"overrides": "x"})
    assert [outcomes.get(trial.run_name) is not None for trial in TRIALS] == [True, False, False, False]


def _end(code):
    return f"os.kill(os.getpid(), {-code})" if code < 0 else f"sys.exit({code})"


def test_an_interrupt_reaches_the_runs_and_the_ablation_goes_on_later(tmp_path):
    waits = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(130))\n"
        f"os.kill({os.getpid()}, signal.SIGINT)\n"
        "signal.pause()"
    )
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, waits, num_jobs=1)
    assert Outcomes(tmp_path, {"overrides": "x"}).get(TRIALS[0].run_name) is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run(tmp_path, "pass")[1] == 4
