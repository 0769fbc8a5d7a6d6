"""What policy and critic learn from an iteration, where there is a critic: advantages and returns, token by token.

The driver knows rewards, one per response; values exist only here. So each rank estimates the advantages of its own sequences and
then whitens them with the mean and variance over the trained tokens of all ranks, as verl and FlashRL do: the size of a step
should depend neither on the scale of the rewards nor on how well the critic already fits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from qurl.algorithms import gae, kl_penalty, last_trained
from qurl.algorithms.advantages import VARIANCE_EPSILON
from qurl.config import AlgorithmConfig, KLPlacement
from qurl.errors import NonFiniteLoss
from qurl.learner.packing import collect, spread
from qurl.observability.metrics import Last, Metric
from qurl.types import MicroBatch, TrainingSample


def fill_value_targets(
    mini_batches: Sequence[tuple[list[TrainingSample], list[MicroBatch]]], config: AlgorithmConfig
) -> dict[str, Metric]:
    """Set advantages and returns of every micro-batch, which has old_values (and logprobs where KL is a reward); returns metrics.

    The reward of a response is due at its last token. With algorithm.kl.placement=reward each token also pays coefficient * kl_t,
    the estimate of KL(old || ref) there (Ouyang et al. 2022, arXiv:2203.02155; verl's use_kl_in_reward). Collective over ranks.
    Raises NonFiniteLoss, on all ranks alike, where a value or a penalty is not finite."""
    batches = [(samples, batch) for samples, of_mini_batch in mini_batches for batch in of_mini_batch]
    in_reward = config.kl.placement is KLPlacement.reward
    sums = torch.zeros(7, dtype=torch.float64)
    for samples, batch in batches:
        outcomes = spread([sample.reward for sample in samples], batch)
        rewards = outcomes.masked_fill(~last_trained(batch.loss_mask, batch.segment_ids), 0.0)
        penalties = _kl(batch, config) if in_reward else torch.zeros_like(rewards)
        estimate_advantages(batch, rewards - config.kl.coefficient * penalties, config)
        sums += _sums(batch, penalties)
    device = batches[0][1].input_ids.device
    sums = sums.to(device)
    distributed.all_reduce(sums)
    count, total, squares, returns, returns_squares, values, kl = sums.tolist()
    if not math.isfinite(squares):
        suspects = [samples[i].sample_id for samples, batch in batches for i in _not_finite(batch)]
        told = f"values or KL penalties are not finite (on this rank in {len(suspects)} samples); no step was applied"
        raise NonFiniteLoss(told, suspects)
    mean, variance = _moments(count, total, squares)
    for _, batch in batches:
        whitened = (batch.advantages - mean) / math.sqrt(variance + VARIANCE_EPSILON)
        batch.advantages = whitened.masked_fill(~batch.loss_mask, 0.0)
    spread_of_returns = _moments(count, returns, returns_squares)[1]
    metrics: dict[str, Metric] = {
        "critic/value_mean": Last(values / max(1.0, count)),
        "critic/explained_variance": Last(1.0 - variance / spread_of_returns if spread_of_returns > VARIANCE_EPSILON else 0.0),
    }
    return metrics | ({"policy/kl_reward": Last(kl / max(1.0, count))} if in_reward else {})


def estimate_advantages(batch: MicroBatch, rewards: Tensor, config: AlgorithmConfig) -> None:
    """Set advantages and returns of a micro-batch from rewards [B, L]. On the CPU: column by column over a few rows, a GPU would do
    little but launch kernels."""
    assert batch.old_values is not None
    tensors = [x.cpu() for x in (rewards, batch.old_values, batch.loss_mask, batch.segment_ids)]
    advantages, returns = gae(*tensors, discount=config.advantage.discount, gae_lambda=config.advantage.gae_lambda)
    batch.advantages, batch.returns = advantages.to(rewards.device), returns.to(rewards.device)


def _kl(batch: MicroBatch, config: AlgorithmConfig) -> Tensor:
    assert batch.old_logprobs is not None and batch.ref_logprobs is not None
    return kl_penalty(batch.old_logprobs, batch.ref_logprobs, batch.loss_mask, config.kl.estimator)


def _sums(batch: MicroBatch, penalties: Tensor) -> Tensor:
    """[7] float64 on the CPU, over trained tokens: their number; A, A^2; R, R^2; V; KL. A = R - V is what a value leaves open."""
    assert batch.returns is not None and batch.old_values is not None
    advantages, returns = batch.advantages.double(), batch.returns.double()
    parts = [batch.loss_mask, advantages, advantages.square(), returns, returns.square(), batch.old_values, penalties]
    return torch.stack([part.sum(dtype=torch.float64) for part in parts]).cpu()


def _moments(count: float, total: float, squares: float) -> tuple[float, float]:
    """(mean, unbiased variance) as in verl's masked_whiten."""
    mean = total / max(1.0, count)
    return mean, max(0.0, squares - total * mean) / max(1.0, count - 1)


def _not_finite(batch: MicroBatch) -> list[int]:
    """Indices of the samples whose values or rewards are not finite."""
    return [index for index, total in zip(batch.sample_indices, collect(batch.advantages, batch), strict=True)
            if not math.isfinite(total)]  # fmt: skip
