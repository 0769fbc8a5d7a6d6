"""What a response votes for in a majority: the answer that its reward function reads, in normal form.

Votes are equal where the texts are; for the rewards that compare mathematics the text is that of the value, so that 1/2 and 0.5 are
one ballot (`qurl.rewards.ballots`). Every function here takes bounded time."""

from __future__ import annotations

from collections.abc import Callable

from qurl.rewards.answers import after_thought, last_boxed
from qurl.rewards.ballots import ballot
from qurl.rewards.boxed import vote as boxed_vote
from qurl.rewards.dapo import vote as dapo_vote
from qurl.rewards.deepscaler import vote as deepscaler_vote
from qurl.rewards.exact import vote as exact_vote
from qurl.rewards.gsm8k import vote as gsm8k_vote

VOTES: dict[str, Callable[[str], str | None]] = {
    "boxed": boxed_vote,
    "dapo": dapo_vote,
    "deepscaler": deepscaler_vote,
    "exact": exact_vote,
    "gsm8k": gsm8k_vote,
    "math": lambda response: ballot(last_boxed(after_thought(response))),  # a response without a box does not vote
}
"""Reward of qurl.rewards.REWARDS -> its vote, a function of the response: the answer, None where there is none."""
