"""From per-token losses to the one number of a mini-batch.

Every sequence gets one weight, known before the mini-batch is cut into micro-batches or spread over ranks, such that the loss
is sum_i weight_i * sum_t loss_it. A sum does not care how it is split, so neither does the gradient."""

from __future__ import annotations

from collections.abc import Sequence

from qurl.config.algorithm import Aggregation, PolicyLossConfig


def token_weights(lengths: Sequence[int], config: PolicyLossConfig) -> list[float]:
    """One weight per sequence of the whole mini-batch; it multiplies the loss of each of the sequence's trained tokens.

    lengths: trained tokens (True in loss_mask) per sequence, >= 0; ValueError otherwise. N: sequences that have a trained token.
    token_mean: 1 / sum of lengths (DAPO, arXiv:2503.14476 eq. 8; verl's token-mean). sequence_mean: 1 / (N * length) (GRPO,
    arXiv:2402.03300 eq. 3; seq-mean-token-mean). constant: 1 / (N * aggregation_constant), so that tokens of a long
    response count no less (Dr. GRPO, arXiv:2503.20783 section 3.2; seq-mean-token-sum-norm). Without trained tokens: 0."""
    if any(n < 0 for n in lengths):
        raise ValueError(f"negative number of trained tokens in {list(lengths)}")
    if config.aggregation is Aggregation.token_mean:
        num_tokens = sum(lengths)
        return [1.0 / num_tokens if n else 0.0 for n in lengths]
    num_sequences = sum(n > 0 for n in lengths)
    if config.aggregation is Aggregation.sequence_mean:
        return [1.0 / (num_sequences * n) if n else 0.0 for n in lengths]
    if not config.aggregation_constant or config.aggregation_constant < 0:
        raise ValueError(
            f"algorithm.policy_loss.aggregation_constant={config.aggregation_constant}: aggregation=constant divides by it; use a "
            "number of tokens, e.g. rollout.max_response_tokens"
        )
    return [1.0 / (num_sequences * config.aggregation_constant) if n else 0.0 for n in lengths]
