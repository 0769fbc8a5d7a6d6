"""What an iteration's rollouts say about the set-up: warnings about runs that cannot learn, which name the key to change."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from qurl.types import ScoredGroup

logger = logging.getLogger(__name__)

TRUNCATED_FRACTION = 0.85
"""From this share of responses cut at rollout.max_response_tokens on, hardly a reward says anything about the answers."""

PATIENCE = 3
"""Iterations in a row with equal rewards before a warning: one or two are chance where groups are few."""


class Symptoms:
    """Looks at each iteration; warns when a symptom appears, and again only after it was gone."""

    def __init__(self) -> None:
        self._were_truncated = False
        self._num_equal = 0  # iterations in a row

    def look(self, step: int, groups: Sequence[ScoredGroup], max_response_tokens: int) -> None:
        """groups: all that were sampled for the iteration. max_response_tokens: the limit they were sampled under."""
        self._look_at_lengths(step, groups, max_response_tokens)
        self._look_at_rewards(step, groups)

    def tell_skipped(self, step: int, metrics: Mapping[str, float], num_steps: int) -> None:
        """Say in the log how many mini-batches of an iteration were not computed. num_steps: its optimizer steps."""
        if count := int(metrics.get("policy/num_skipped_mini_batches", 0)):
            logger.info(
                "iteration %d: all advantages are 0 in %d of %d mini-batches; forward and backward were skipped, and the "
                "optimizer stepped with a gradient of zero", step, count, num_steps,
            )

    def _look_at_lengths(self, step: int, groups: Sequence[ScoredGroup], limit: int) -> None:
        rollouts = [rollout for scored in groups for rollout in scored.group.rollouts]
        count = sum(rollout.finish_reason == "length" for rollout in rollouts)
        are_truncated = count > 0 and count >= TRUNCATED_FRACTION * len(rollouts)
        if are_truncated and not self._were_truncated:
            logger.warning(
                "iteration %d: %d of %d responses were cut at rollout.max_response_tokens=%d, most without an answer; raise it, or "
                "see in rollouts/ whether responses go on after their end: rollout.stop_token_ids and the chat template end them",
                step, count, len(rollouts), limit,
            )
        self._were_truncated = are_truncated

    def _look_at_rewards(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        rewards = [[result.value for result in scored.rewards if result.value is not None] for scored in groups]
        values = {value for group in rewards for value in group}
        has_groups = any(len(group) > 1 for group in rewards)
        are_equal = bool(values) and (len(values) == 1 or (has_groups and all(len(set(group)) <= 1 for group in rewards)))
        self._num_equal = self._num_equal + 1 if are_equal else 0
        if self._num_equal != PATIENCE:
            return
        if len(values) == 1:
            what = f"all rewards are {values.pop():g}"
        else:
            what = "rewards are equal within each prompt's responses"
        logger.warning(
            "iteration %d: %s, for %d iterations in a row, so there is nothing to learn; compare reward.function with the "
            "responses in rollouts/, take problems of data.train that are neither too hard nor too easy for the model, or raise "
            "rollout.num_samples_per_prompt", step, what, PATIENCE,
        )
