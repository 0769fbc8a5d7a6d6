"""The check before a run that each row can be paid: its own ground truth, in the reward's own form, must be right.

A row that fails it trains on wrong answers alone, or makes a benchmark harder than it is: text where the reward wants a number,
braces that never close."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace

from qurl.config import RewardConfig, Unpayable
from qurl.rewards.forms import FORMS, stated
from qurl.rewards.pool import check_reward_function, unpaid_indices
from qurl.types import Prompt

logger = logging.getLogger(__name__)

NUM_NAMED = 5  # rows that a message names


def payable(
    config: RewardConfig, prompts: Sequence[Prompt], key: str, remedy: str = "set reward.unpayable=drop (or keep)"
) -> list[Prompt]:
    """Return the prompts whose ground truth the reward pays, after `reward.unpayable`.

    key: where the data stand in the configuration and in which file, e.g. "data.train.path=train.jsonl". remedy: what else the
    user can do, for the message. A reward of somebody's own
    has a form that only its author knows: it scores the first prompt and must return a number. ValueError where the function
    cannot be used, and where rows cannot be paid and `reward.unpayable` is error, or no row is left."""
    if config.function not in FORMS:
        check_reward_function(config, prompts[:1])
        return list(prompts)
    unpaid = unpaid_prompts(config, prompts)
    if not unpaid:
        return list(prompts)
    found = (
        f"{key}: reward.function={config.function!r} fails on problem {unpaid[0].prompt_id}: a response that states the ground "
        f"truth is not paid; so it is with {len(unpaid)} of {len(prompts)} rows "
        f"({', '.join(_named(prompt) for prompt in unpaid[:NUM_NAMED])}{', ...' if len(unpaid) > NUM_NAMED else ''})"
    )
    if config.unpayable is Unpayable.error or len(unpaid) == len(prompts):
        raise ValueError(f"{found}; mend them, use another reward, or {remedy}")
    logger.warning("%s; reward.unpayable=%s", found, config.unpayable.name)
    lost = {prompt.prompt_id for prompt in unpaid}
    return [p for p in prompts if p.prompt_id not in lost] if config.unpayable is Unpayable.drop else list(prompts)


def unpaid_prompts(config: RewardConfig, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts whose ground truth a reward of qurl's own does not pay when a response states it in the reward's form."""
    bare = [replace(prompt, extra={}, text="") for prompt in prompts]  # rows of some MB need not travel
    texts = [stated(config.function, prompt.ground_truth) for prompt in prompts]
    return [prompts[index] for index in unpaid_indices(config, bare, texts)]


def _named(prompt: Prompt) -> str:
    row = re.fullmatch(r"(?:e\d+-)?r(\d+)", prompt.prompt_id)
    return f"row {int(row[1]) + 1 if row else prompt.prompt_id} {prompt.ground_truth[:40]!r}"
