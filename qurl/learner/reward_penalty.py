"""KL to the reference policy as a part of the reward.

The driver computes advantages from rewards alone; the logprobs that a penalty is made of exist only here. So where
`algorithm.kl.placement=reward` every rank gathers the penalized rewards of all ranks and computes all advantages anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import distributed

from qurl.algorithms import ADVANTAGES, RewardedGroup, kl_penalty
from qurl.config import AlgorithmConfig
from qurl.errors import NonFiniteLoss
from qurl.learner.packing import collect, spread
from qurl.learner.splitting import prompt_id
from qurl.observability.metrics import Mean, Metric
from qurl.plug import resolve
from qurl.types import MicroBatch, TrainingSample


def charge_kl(mini_batches: Sequence[tuple[list[TrainingSample], list[MicroBatch]]], config: AlgorithmConfig) -> dict[str, Metric]:
    """Replace the advantages of every micro-batch by those of the rewards r - coefficient * sum_t kl_t; returns metrics.

    mini_batches: this rank's samples of each mini-batch and the micro-batches packed from them, with old and ref logprobs. kl_t is
    the estimate of KL(old || ref) at each trained token. Collective over ranks. Ouyang et al. 2022 (arXiv:2203.02155) eq. 2; verl's
    use_kl_in_reward. Raises NonFiniteLoss, on all ranks alike, where a penalty is not finite."""
    rewarded: list[tuple[str, float, int]] = []
    total, num_tokens = 0.0, 0
    for samples, batches in mini_batches:
        for batch in batches:
            penalties = _penalties(batch, config)
            rewarded += [
                (samples[index].sample_id, samples[index].reward - config.kl.coefficient * penalty, sum(samples[index].loss_mask))
                for index, penalty in zip(batch.sample_indices, penalties, strict=True)
            ]
            total += sum(penalties)
            num_tokens += int(batch.loss_mask.sum())
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, rewarded)
    gathered = [item for theirs in everyone for item in theirs]
    suspects = [sample_id for sample_id, reward, _ in gathered if not math.isfinite(reward)]
    if suspects:
        raise NonFiniteLoss(f"the KL penalty is not finite in {len(suspects)} samples; no step was applied", suspects)
    advantages = _advantages(gathered, config)
    for samples, batches in mini_batches:
        for batch in batches:
            own = [advantages[sample.sample_id] for sample in samples]
            batch.advantages = spread(own, batch).masked_fill(~batch.loss_mask, 0.0)
    return {"policy/kl_reward": Mean(total / max(1, num_tokens), weight=num_tokens)}


def _penalties(batch: MicroBatch, config: AlgorithmConfig) -> list[float]:
    """sum_t kl_t of each sequence, nats, in the order of batch.sample_indices."""
    assert batch.old_logprobs is not None and batch.ref_logprobs is not None
    return collect(kl_penalty(batch.old_logprobs, batch.ref_logprobs, batch.loss_mask, config.kl.estimator), batch)


def _advantages(rewarded: Sequence[tuple[str, float, int]], config: AlgorithmConfig) -> dict[str, float]:
    """Advantage by sample id from (sample id, reward, trained tokens) of the whole iteration."""
    prompts: dict[str, list[tuple[str, float, int]]] = {}
    for item in rewarded:
        prompts.setdefault(prompt_id(item[0]), []).append(item)
    groups = [RewardedGroup(rewards=[r for _, r, _ in items], lengths=[n for _, _, n in items]) for items in prompts.values()]
    advantages = resolve(ADVANTAGES, config.advantage.name, "algorithm.advantage.name")(groups, config.advantage)
    return {
        sample_id: worth
        for items, of_group in zip(prompts.values(), advantages, strict=True)
        for (sample_id, _, _), worth in zip(items, of_group, strict=True)
    }
