"""Text a policy may write: what cannot be compared is wrong, after bounded effort."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reward_pool import group, score

from qurl.config import RewardConfig
from qurl.rewards import REWARDS, VOTES
from qurl.rewards.answers import last_boxed, whole_number
from qurl.rewards.dapo import TAIL_CHARACTERS

TIMEOUT_S = 1.5  # of the fuzzer
MAX_CPU_S = 2.0
SLACK_S = 5.0  # to notice and kill, on a busy machine
HOSTILE = {
    "unclosed braces": r"\boxed{" + "{" * 5000,
    "a megabyte of digits": r"\boxed{" + "9" * 1_000_000 + "}",
    "nested boxes": r"\boxed{" * 5000 + "1" + "}" * 5000,
    "box before the end of thinking": r"\boxed{7}</think> no idea",
    "several answers": r"</think>\boxed{7} or \boxed{8}",
    "unicode": "</think>\\boxed{\u0667\uff17\U0001f600\u202e}",
    "python power": r"</think>\boxed{9**9**9}",
    "power tower": r"</think>\boxed{9^{9^{9^{9}}}}",
    "factorial": r"</think>\boxed{999999999!}",
    "sum without end": r"</think>\boxed{\sum_{k=1}^{99999}\sin(k^k)}",
    "integral": r"</think>\boxed{\int_0^1 e^{e^{x^2}}\sin(x^x)dx}",
    "many items": r"</think>\boxed{" + ",".join("7" * 99) + "}",
    "parentheses": r"</think>\boxed{" + "(" * 500 + "1" + ")" * 500 + "}",
}


@pytest.mark.parametrize("function", ["math", "deepscaler"])
def test_hostile_text_is_wrong_within_two_seconds_of_cpu_time(function):
    texts = list(HOSTILE.values())
    right = r"</think>\boxed{7}"
    (rewards,) = score(RewardConfig(function=function, num_workers=1), group(*texts, right, ground_truth="7"))
    for name, result in zip(HOSTILE, rewards, strict=False):
        assert result.value == 0.0, (name, result)
        assert result.elapsed_s < MAX_CPU_S + SLACK_S, (name, result)
    assert rewards[-1].value == 1.0


def test_a_short_seeded_run_of_the_fuzzer():
    path = Path(__file__).parents[2] / "fuzz" / "fuzz_rewards.py"
    spec = importlib.util.spec_from_file_location("fuzz_rewards", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert asyncio.run(module.fuzz(seed=0, num_responses=5, timeout_s=TIMEOUT_S)).total() == 5 * len(REWARDS)


TEXT = st.text(st.sampled_from("\\{}b7x ,.$\n"), max_size=40) | st.text(max_size=40)
PIECES = st.lists(st.sampled_from(["\\boxed{", "\\fbox {", "{", "}", "\\{", "\\}", "\\", "7", " "]), max_size=12).map("".join)


def slow_last_boxed(text):
    """From the last opening, character by character."""
    starts = [end for start in range(len(text)) for end in range(start, len(text) + 1)
              if text[start:end] in {f"\\{word}{' ' * n}{{" for word in ("boxed", "fbox") for n in range(10)}]  # fmt: skip
    if not starts:
        return None
    depth, index, begin = 1, max(starts), max(starts)
    while index < len(text):
        if text[index] == "\\":
            index += 2
            continue
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return text[begin:index]
        index += 1
    return ""


@settings(deadline=None)
@given(PIECES)
def test_the_last_box_is_what_a_slow_reader_finds(text):
    assert last_boxed(text) == slow_last_boxed(text)


@settings(deadline=None)
@given(TEXT, st.sampled_from(["boxed", "dapo", "exact", "gsm8k"]))
def test_textual_verifiers_and_votes_answer_any_text(text, name):
    assert REWARDS[name](text, "7") in (-1.0, 0.0, 1.0)
    vote = VOTES[name](text)
    assert vote is None or (isinstance(vote, str) and vote)


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12), TEXT.filter(lambda text: "nswer" not in text and "\n" not in text))
def test_dapo_reads_integers_after_anything(number, before):
    assert REWARDS["dapo"](f"{before}\nAnswer: {number}", str(number)) == 1.0
    assert REWARDS["dapo"](f"{before}\nAnswer: {number:,}", f"{number}.0") == 1.0
    assert REWARDS["dapo"](f"{before}\nAnswer: {number + 1}", str(number)) == -1.0
    assert REWARDS["dapo"](f"Answer: {number}\n" + "x" * TAIL_CHARACTERS, str(number)) == -1.0


@settings(deadline=None, max_examples=30)
@given(st.integers(-999, 999), st.integers(1, 99), TEXT.filter(lambda text: "</think>" not in text))
def test_deepscaler_reads_fractions_after_any_thought(numerator, denominator, thought):
    fraction = rf"\boxed{{\frac{{{numerator}}}{{{denominator}}}}}"
    truth = rf"\frac{{{3 * numerator}}}{{{3 * denominator}}}"
    assert REWARDS["deepscaler"](f"{thought}</think>{fraction}", truth) == 1.0
    assert REWARDS["deepscaler"](f"{thought}{fraction}", truth) == 0.0
    assert REWARDS["deepscaler"](f"{thought}{fraction}</think>", truth) == 0.0
    wrong = rf"\boxed{{\frac{{{numerator + denominator}}}{{{denominator}}}}}"
    assert REWARDS["deepscaler"](f"{thought}</think>{wrong}", truth) == 0.0


@given(st.integers(), st.integers(0, 5))
def test_whole_numbers_lose_their_zeros_and_nothing_else_changes(number, zeros):
    assert whole_number(f"{number}.{'0' * zeros}" if zeros else str(number)) == str(number)
    assert whole_number(f"{number}.5") == f"{number}.5"
