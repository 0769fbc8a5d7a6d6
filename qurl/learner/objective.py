"""The loss of a micro-batch: correction of the rollout mismatch, policy loss, KL and entropy, weighted over the mini-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from qurl.algorithms import CORRECTIONS, POLICY_LOSSES, Correction, CorrectionInputs, PolicyLossInputs, kl_penalty
from qurl.config import AlgorithmConfig, KLPlacement
from qurl.observability.metrics import Mean, Metric, Sum
from qurl.plug import resolve
from qurl.types import MicroBatch


class Objective:
    """What the algorithm group of a run asks to minimize. Raises ValueError for an unknown correction or policy loss."""

    def __init__(self, config: AlgorithmConfig):
        self._config = config
        self._correct = resolve(CORRECTIONS, config.correction.name, "algorithm.correction.name")
        self._policy_loss = resolve(POLICY_LOSSES, config.policy_loss.name, "algorithm.policy_loss.name")
        self._penalizes_loss = bool(config.kl.coefficient) and config.kl.placement is KLPlacement.loss

    def loss(
        self, batch: MicroBatch, logprobs: Tensor, entropy: Tensor, token_weights: Tensor, mean_weight: float
    ) -> tuple[Tensor, dict[str, Metric]]:
        """(this micro-batch's part of the mini-batch loss, metrics).

        logprobs, entropy: [B, L] as Policy returns them. token_weights: [B, L], what aggregation gives each token. mean_weight: the
        correction's weights are divided by it. Where batch.old_logprobs is None the policy still is the old one."""
        config, mask = self._config, batch.loss_mask
        correction = self._correction(batch, logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs)
        output = self._policy_loss(PolicyLossInputs(
            logprobs=logprobs, base_logprobs=correction.base_logprobs, advantages=batch.advantages, mask=correction.keep_mask,
            weights=correction.weights / mean_weight, clip_high_scale=correction.clip_high_scale, segment_ids=batch.segment_ids,
        ), config.policy_loss)
        num_tokens = int(mask.sum())
        report: dict[str, Metric] = {
            **correction.metrics,
            **output.metrics,
            "policy/entropy": Mean(float(entropy.detach().sum()) / max(1, num_tokens), weight=num_tokens),
            "policy/tokens": Sum(num_tokens),
        }
        loss = output.loss
        if self._penalizes_loss:
            assert batch.ref_logprobs is not None
            penalty = kl_penalty(logprobs, batch.ref_logprobs, correction.keep_mask, config.kl.estimator)
            report["policy/kl_loss"] = Mean(float(penalty.detach().sum()) / max(1, num_tokens), weight=num_tokens)
            loss = loss + config.kl.coefficient * penalty
        if config.entropy_coefficient:
            loss = loss - config.entropy_coefficient * entropy.masked_fill(~correction.keep_mask, 0.0)
        return (loss * token_weights).sum(), report

    def mean_weight(self, batches: Sequence[MicroBatch], device: torch.device) -> float:
        """The mean of the correction's weights over the tokens of a mini-batch that enter the loss, those of all ranks included; 1
        without such tokens. Collective; needs batch.old_logprobs."""
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in batches:
            assert batch.old_logprobs is not None
            correction = self._correction(batch, batch.old_logprobs)
            kept = correction.weights.double().masked_fill(~correction.keep_mask, 0.0)
            sums += torch.stack([kept.sum(), correction.keep_mask.sum().double()])
        distributed.all_reduce(sums)
        total, count = sums.tolist()
        return total / count if total else 1.0

    def _correction(self, batch: MicroBatch, old_logprobs: Tensor) -> Correction:
        return self._correct(CorrectionInputs(
            old_logprobs=old_logprobs, rollout_logprobs=batch.rollout_logprobs, mask=batch.loss_mask, segment_ids=batch.segment_ids,
        ), self._config.correction)
