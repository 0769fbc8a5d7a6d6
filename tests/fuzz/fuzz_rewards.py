"""Throw hostile text at every verifier through a real pool:  python tests/fuzz/fuzz_rewards.py --seconds 600 --seed 1

Each response costs at most the time limit, ends in a reward of its function or in an error with a reason, and leaves a pool that
still tells right from wrong. What breaks this is printed with its seed and ends the run with exit code 1."""

from __future__ import annotations

import argparse
import asyncio
import collections
import random
import sys
import time

from qurl.config import RewardConfig
from qurl.rewards import REWARDS, VOTES, RewardPool
from qurl.types import Prompt, Rollout, RolloutGroup

FRAGMENTS = (
    "\\boxed{", "\\fbox {", "}", "{", "\\{", "\\}", "\\frac{", "\\frac12", "\\sqrt", "\\text{", "\\left(", "\\right)", "\\cup",
    "\\infty", "\\begin{pmatrix}", "\\\\", "\\end{pmatrix}", "\\binom{9}{", "\\sum_{n=1}^{\\infty}", "\\int_0^1",
    "\\lim_{x\\to 0}", "!", "^", "_", "**", "9**9**9", "9^{9^{9}}", "10^{10^{10}}", "999999999!", "(", ")", "[", "]", ",", "=",
    "<", ">", "x", "y", "e", "i", "\\pi", "1", "7", "0.1", "-", "+", "*", "/", "%", "$", "$$", "#", "####", "Answer:",
    "answer :", "</think>", "<think>", "\n", " ", "\t", "\0", "\\", "\u0663", "\uff11", "\u2212", "\U0001f600", "\u202e",
    "\ud800", "NaN", "inf", "__import__('os')", "lambda: 0", "9" * 1000, "1," * 500, "(" * 200, "\\frac{1}{" * 30,
    "\\boxed{" * 100, "}" * 100, "x+" * 50,
)  # fmt: skip
RIGHT = {"dapo": "Answer: 7", "deepscaler": "</think>\\boxed{7}", "exact": "7", "gsm8k": "#### 7"}
SLACK_S = 3.0  # to notice the limit and kill, on a busy machine


def hostile(generator: random.Random) -> str:
    """Fragments in any order, sometimes repeated up to a megabyte, often inside what a verifier looks for."""
    body = "".join(generator.choices(FRAGMENTS, k=generator.choice((1, 3, 10, 40))))
    if generator.random() < 0.1:
        body *= generator.choice((10, 1000)) if len(body) < 1000 else 10
    return generator.choice(("{}", "\\boxed{{{}}}", "</think>\\boxed{{{}}}", "#### {}", "Answer: {}")).format(body)[:1_000_000]


async def fuzz(seed: int, num_responses: int, timeout_s: float) -> collections.Counter[str]:
    """Score `num_responses` per verifier; how they ended. AssertionError with the response that breaks a promise."""
    generator, ends = random.Random(seed), collections.Counter[str]()
    for name in sorted(REWARDS):
        responses = [hostile(generator) for _ in range(num_responses)]
        pool = RewardPool(RewardConfig(function=name, timeout_s=timeout_s))
        await pool.start()
        try:
            hostile_results = (await pool.score(_group(responses))).rewards
            (after,) = (await pool.score(_group([RIGHT.get(name, "\\boxed{7}")]))).rewards
        finally:
            await pool.close()
        for response, result in zip(responses, hostile_results, strict=True):
            told = f"seed {seed}, {name}, {response[:300]!r}: {result}"
            assert (result.value in (-1.0, 0.0, 1.0)) != bool(result.error), told
            assert result.elapsed_s < timeout_s + SLACK_S, told
            VOTES[name](response)
            ends[f"{name} {'error' if result.error else result.value}"] += 1
        assert after.value == 1.0, f"seed {seed}, {name}: after all that a right answer gets {after}"
    return ends


def _group(texts: list[str]) -> RolloutGroup:
    prompt = Prompt(prompt_id="r0", token_ids=[1], text="q", ground_truth="7", data_source="fuzz")
    return RolloutGroup(prompt=prompt, rollouts=[
        Rollout(sample_index=i, token_ids=[1], rollout_logprobs=[0.0], weight_versions=[0], finish_reason="stop", text=text,
                engine_id="e", seed=0) for i, text in enumerate(texts)
    ])  # fmt: skip


def main() -> int:
    """Fuzz for a given time, a seed after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--timeout-s", type=float, default=2.0)
    args = parser.parse_args()
    begin, seed, ends = time.monotonic(), args.seed, collections.Counter[str]()
    while time.monotonic() - begin < args.seconds:
        try:
            ends += asyncio.run(fuzz(seed, num_responses=20, timeout_s=args.timeout_s))
        except AssertionError as error:
            print(error)
            return 1
        seed += 1
    print(f"seeds {args.seed} to {seed - 1}: {dict(sorted(ends.items()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
