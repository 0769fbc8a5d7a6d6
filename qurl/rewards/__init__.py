"""Verifiers, text in and number out, and the pool of killable processes that runs them. Imports neither torch nor vllm."""

from __future__ import annotations

from collections.abc import Callable

from qurl.rewards.boxed import boxed
from qurl.rewards.dapo import dapo
from qurl.rewards.deepscaler import deepscaler
from qurl.rewards.exact import exact
from qurl.rewards.gsm8k import gsm8k
from qurl.rewards.math import math
from qurl.rewards.payment import payable
from qurl.rewards.pool import RewardPool, check_reward_function
from qurl.rewards.votes import VOTES

REWARDS: dict[str, Callable[..., float]] = {
    "boxed": boxed,
    "dapo": dapo,
    "deepscaler": deepscaler,
    "exact": exact,
    "gsm8k": gsm8k,
    "math": math,
}

__all__ = ["REWARDS", "VOTES", "RewardPool", "check_reward_function", "payable"]
