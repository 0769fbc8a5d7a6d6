"""Batch arithmetic of one training iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qurl.config.run import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """Counts per iteration; token numbers are upper bounds, since responses may be shorter."""

    num_prompts: int
    num_samples: int
    num_samples_per_engine: int
    num_mini_batches: int  # = optimizer steps
    num_samples_per_mini_batch: int
    num_samples_per_rank: int  # of a mini-batch, the largest share
    longest_tokens: int  # prompt + response
    max_tokens: int  # of all samples
    max_micro_batches: int  # of a rank and mini-batch, when every sample is as long as allowed
    num_optimizer_steps: int  # of the whole run


def plan_batch(config: TrainConfig, stage: int = 0) -> BatchPlan:
    """What the counts in rollout and learner come to in a stage."""
    rollout, learner = config.rollout_of_stage(stage), config.learner
    samples = rollout.num_prompts_per_step * rollout.num_samples_per_prompt
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    per_mini_batch = samples // learner.num_mini_batches
    per_rank = math.ceil(per_mini_batch / learner.num_ranks)
    return BatchPlan(
        num_prompts=rollout.num_prompts_per_step,
        num_samples=samples,
        num_samples_per_engine=math.ceil(samples / rollout.num_engines),
        num_mini_batches=learner.num_mini_batches,
        num_samples_per_mini_batch=per_mini_batch,
        num_samples_per_rank=per_rank,
        longest_tokens=longest,
        max_tokens=samples * longest,
        max_micro_batches=math.ceil(per_rank / max(1, learner.max_tokens_per_micro_batch // longest)),
        num_optimizer_steps=config.num_steps * learner.num_mini_batches,
    )
