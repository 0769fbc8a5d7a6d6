"""The pool under functions that raise, hang, crash and lie."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qurl.config import RewardConfig
from qurl.rewards import REWARDS, RewardPool, check_reward_function
from qurl.types import Prompt, Rollout, RolloutGroup

BEHAVIORS = """
import os, re, signal, sys, time

def act(response, ground_truth):
    open(f"{__file__}.{response}", "w").close()  # says that the call has begun
    if response == "sleep":
        time.sleep(60)
    if response == "regex":  # C code that holds the interpreter: no signal handler or thread gets a turn
        re.match(r"(a+)+$", "a" * 60 + "b")
    if response == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "exit":
        os._exit(3)
    if response == "sys.exit":
        sys.exit(4)
    if response == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "raise":
        raise KeyError("lost")
    if response == "recursion":
        return act("recursion", ground_truth)
    if response == "print":
        print("noise" * 1000)
        sys.stdout.flush()
        os.write(1, b"more noise")
    if response == "stdin":
        return float(len(sys.stdin.read()))
    if response == "pid":
        return os.getpid()
    values = {"none": None, "nan": float("nan"), "inf": float("inf"), "text": "1.0", "list": [1.0], "true": True, "int": 1}
    return values.get(response, 0.25)
"""


@pytest.fixture
def behaviors(tmp_path):
    path = tmp_path / "behaviors.py"
    path.write_text(BEHAVIORS)
    return f"{path}:act"


def prompt(**fields):
    return Prompt(**{"prompt_id": "r0", "token_ids": [1], "text": "q", "ground_truth": "2", "data_source": "x", **fields})


def group(*texts, **fields):
    rollouts = [
        Rollout(sample_index=i, token_ids=[1], rollout_logprobs=[0.0], weight_versions=[0], finish_reason="stop", text=text,
                engine_id="e", seed=0) for i, text in enumerate(texts)
    ]  # fmt: skip
    return RolloutGroup(prompt=prompt(**fields), rollouts=rollouts)


def score(config, *groups):
    """Rewards of groups that are scored concurrently."""

    async def run():
        pool = RewardPool(config)
        await pool.start()
        try:
            return [scored.rewards for scored in await asyncio.gather(*map(pool.score, groups))]
        finally:
            await pool.close()

    return asyncio.run(run())


async def begun(behaviors, response):
    """Wait until a worker has begun the call for `response`."""
    mark = Path(f"{behaviors.removesuffix(':act')}.{response}")
    while not mark.exists():
        await asyncio.sleep(0.01)


def is_running(pid):
    """False for a process that is gone or only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids):
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"{pids} still run"
        time.sleep(0.01)


def test_many_groups_are_scored_in_order_by_two_workers():
    groups = [group(*(f"#### {i + j}" for j in range(4)), ground_truth=str(i)) for i in range(50)]
    for rewards in score(RewardConfig(function="gsm8k", num_workers=2), *groups):
        assert [r.value for r in rewards] == [1.0, 0.0, 0.0, 0.0]
        assert all(r.error is None and r.elapsed_s >= 0 for r in rewards)


@pytest.mark.parametrize("hang", ["sleep", "regex"])
def test_a_call_that_hangs_costs_its_time_limit_and_nothing_else(behaviors, hang):
    config = RewardConfig(function=behaviors, num_workers=1, timeout_s=0.3)
    ((before, hung, after),) = score(config, group("ok", hang, "ok"))
    assert (before.value, after.value) == (0.25, 0.25)
    assert (hung.value, hung.error) == (None, "timeout after 0.3 s")
    assert 0.3 <= hung.elapsed_s < 5


@pytest.mark.parametrize(
    ("death", "how"),
    [("segfault", "signal SIGSEGV"), ("exit", "exit code 3"), ("killed", "signal SIGKILL")],
)
def test_a_worker_that_dies_is_replaced_and_only_its_response_is_an_error(behaviors, death, how):
    config = RewardConfig(function=behaviors, num_workers=1)
    ((before, died, after),) = score(config, group("ok", death, "ok"))
    assert (before.value, after.value) == (0.25, 0.25)
    assert died.value is None and died.error == f"the worker process died ({how})"


def test_what_is_not_a_finite_number_is_an_error_with_its_reason(behaviors):
    texts = ["raise", "none", "nan", "inf", "text", "list", "recursion", "sys.exit"]
    (rewards,) = score(RewardConfig(function=behaviors), group(*texts))
    for reward, word in zip(
        rewards, ["KeyError: 'lost'", "NoneType", "nan", "inf", "str", "list", "RecursionError", "SystemExit: 4"], strict=True
    ):
        assert reward.value is None and word in reward.error
    (rewards,) = score(RewardConfig(function=behaviors), group("true", "int"))
    assert [r.value for r in rewards] == [1.0, 1.0]


def test_printing_and_reading_input_do_not_disturb_the_protocol(behaviors):
    (rewards,) = score(RewardConfig(function=behaviors, timeout_s=5), group("print", "stdin", "ok"))
    assert [r.value for r in rewards] == [0.25, 0.0, 0.25]


def test_workers_killed_from_outside_are_replaced_whether_idle_or_busy(behaviors):
    async def run():
        pool = RewardPool(RewardConfig(function=behaviors, timeout_s=30))
        await pool.start()
        try:
            first = int((await pool.score(group("pid"))).rewards[0].value)
            os.kill(first, signal.SIGKILL)
            wait_until_gone([first])
            idle = await pool.score(group("pid"))  # the death cost no response
            second = int(idle.rewards[0].value)
            busy = asyncio.create_task(pool.score(group("sleep", "ok")))
            await begun(behaviors, "sleep")
            os.kill(second, signal.SIGKILL)
            return first, second, (await busy).rewards
        finally:
            await pool.close()

    first, second, (died, after) = asyncio.run(run())
    assert first != second
    assert died.error == "the worker process died (signal SIGKILL)"
    assert after.value == 0.25


def test_closing_ends_a_hanging_call_and_all_processes(behaviors):
    async def run():
        pool = RewardPool(RewardConfig(function=behaviors, num_workers=2, timeout_s=60))
        await pool.start()
        pids = {int(r.value) for g in await asyncio.gather(*[pool.score(group("pid")) for _ in range(20)]) for r in g.rewards}
        hanging = [asyncio.create_task(pool.score(group("sleep", "sleep"))) for _ in range(3)]
        await begun(behaviors, "sleep")
        await pool.close()
        await pool.close()
        outcomes = await asyncio.gather(*hanging, return_exceptions=True)
        return pids, outcomes

    pids, outcomes = asyncio.run(run())
    assert [str(o) for o in outcomes] == ["the reward pool is closed"] * 3
    wait_until_gone(pids)


DRIVER = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from test_reward_pool import begun, group
from qurl.config import RewardConfig
from qurl.rewards import RewardPool

async def main():
    pool = RewardPool(RewardConfig(function={function!r}, num_workers=2, timeout_s=1000))
    await pool.start()
    pids = {{int(r.value) for _ in range(20) for r in (await pool.score(group("pid", "pid"))).rewards}}
    hanging = asyncio.create_task(pool.score(group("regex")))
    await begun({function!r}, "regex")
    print(*pids, flush=True)
    await hanging

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the parent's death")
def test_workers_do_not_outlive_a_driver_that_is_killed(behaviors):
    code = DRIVER.format(tests=str(Path(__file__).parent), function=behaviors)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as driver:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert pids and all(map(is_running, pids))
        driver.kill()
    wait_until_gone(pids)


HOSTILE = {
    "digits": "9" * 1_000_000,
    "boxed digits": r"\boxed{" + "9" * 1_000_000 + "}",
    "unclosed boxes": r"\boxed{" * 140_000,
    "nested braces": r"\boxed{" + "{" * 500_000 + "}" * 500_001,
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 3000 + "1" + "}" * 3001,
    "power tower": r"\boxed{9**9**9}",
    "dollars": "$" * 1_000_000,
    "factorials": r"\boxed{" + "9" + "!" * 50 + "}",
}


def test_hostile_text_is_never_right_and_the_next_response_is_scored():
    config = RewardConfig(function="math", num_workers=2, timeout_s=0.3)
    (rewards,) = score(config, group(r"\boxed{2}", *HOSTILE.values(), r"\boxed{1+1}"))
    assert (rewards[0].value, rewards[-1].value) == (1.0, 1.0)
    for name, reward in zip(HOSTILE, rewards[1:-1], strict=True):
        assert reward.value == 0.0 or reward.error is not None, name


def test_a_busy_event_loop_is_not_taken_for_a_slow_verifier(behaviors):
    async def run():
        pool = RewardPool(RewardConfig(function=behaviors, timeout_s=0.3))
        await pool.start()
        scoring = asyncio.create_task(pool.score(group(*["ok"] * 20)))
        await asyncio.sleep(0)
        end = time.monotonic() + 0.8
        while time.monotonic() < end:
            pass
        try:
            return (await scoring).rewards
        finally:
            await pool.close()

    assert [r.error for r in asyncio.run(run())] == [None] * 20


def test_workers_import_neither_torch_nor_vllm(tmp_path):
    path = tmp_path / "modules.py"
    path.write_text(
        "import sys\ndef f(response, ground_truth):\n    return len({'torch', 'vllm', 'transformers', 'ray'} & set(sys.modules))\n"
    )
    ((found,),) = score(RewardConfig(function=f"{path}:f"), group("x"))
    assert found.value == 0.0


FIRST_CALL = r"""
import sys
from qurl.config import RewardConfig
from qurl.rewards import REWARDS, worker

name = sys.argv[1]
worker._load(RewardConfig(function=name))
before = set(sys.modules)
REWARDS[name](response="so</think>\\boxed{1}\nAnswer: 1\n#### 1", ground_truth="2")
print(*sorted(set(sys.modules) - before))
"""


@pytest.mark.parametrize("name", REWARDS)
def test_the_first_response_waits_for_no_library(name):
    done = subprocess.run([sys.executable, "-c", FIRST_CALL, name], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("field", "value"), [("num_workers", 0), ("timeout_s", 0.0), ("timeout_s", float("nan")), ("timeout_s", float("inf"))]
)
def test_limits_without_sense_are_refused(field, value):
    with pytest.raises(ValueError, match=f"reward.{field}="):
        RewardPool(RewardConfig(**{field: value}))


def test_a_pool_whose_function_cannot_be_loaded_does_not_start():
    async def run():
        await RewardPool(RewardConfig(function="no_such_module:f", num_workers=2)).start()

    with pytest.raises(ValueError, match="reward.function='no_such_module:f'"):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, ["cannot import", "no file"]),
        ("def g(response, ground_truth): return 1.0", ["has no attribute 'f'"]),
        ("1 / 0", ["cannot import", "ZeroDivisionError"]),
        ("import os; os._exit(5)", ["died (exit code 5)"]),
        ("import sys; sys.exit(5)", ["cannot import", "SystemExit: 5"]),
        ("def f(response): return 1.0", ["signature (response)", "(response, ground_truth, **extra)"]),
        ("def f(response, ground_truth, year): return 1.0", ["TypeError", "year"]),
        ("def f(response, ground_truth): raise RuntimeError('no luck')", ["RuntimeError: no luck", "ground truth '2'"]),
        ("import time\ndef f(response, ground_truth): time.sleep(60)", ["timeout after 0.3 s"]),
        ("def f(prompts, completions, **columns): return [1.0]", ["list"]),
    ],
)  # fmt: skip
def test_a_function_that_cannot_work_is_refused_before_the_run(tmp_path, source, words):
    path = tmp_path / "reward.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ValueError) as caught:
        check_reward_function(RewardConfig(function=f"{path}:f", timeout_s=0.3), [prompt()])
    for word in ["reward.function=", *words]:
        assert word in str(caught.value), str(caught.value)


def test_a_function_that_works_passes_the_check():
    check_reward_function(RewardConfig(function="math"), [prompt(ground_truth=r"\frac{1}{2}")])
    with pytest.raises(ValueError, match="holds no number"):
        check_reward_function(RewardConfig(function="gsm8k"), [prompt(ground_truth="7"), prompt(ground_truth="Evelyn")])
