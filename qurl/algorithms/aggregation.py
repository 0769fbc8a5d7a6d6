"""From per-token losses to the one number of a mini-batch.

Every sequence gets one weight, known before the mini-batch is cut into micro-batches or spread over ranks, such that the loss
is sum_i weight_i * sum_t loss_it. A sum does not care how it is split, so neither does the gradient."""

from __future__ import annotations

from collections.abc import Sequence

from qurl.config.algorithm import Aggregation


def token_weights(lengths: Sequence[int], aggregation: Aggregation) -> list[float]:
    """One weight per sequence of the whole mini-batch; it multiplies the loss of each of the sequence's trained tokens.

    lengths: trained tokens (True in loss_mask) per sequence, >= 0; ValueError otherwise. token_mean: 1 / sum of lengths (DAPO,
    arXiv:2503.14476 eq. 8). sequence_mean: 1 / (N * length), N the sequences that have a trained token (GRPO,
    arXiv:2402.03300 eq. 3). A sequence without trained tokens weighs 0."""
    if any(n < 0 for n in lengths):
        raise ValueError(f"negative number of trained tokens in {list(lengths)}")
    if aggregation is Aggregation.token_mean:
        num_tokens = sum(lengths)
        return [1.0 / num_tokens if n else 0.0 for n in lengths]
    num_sequences = sum(n > 0 for n in lengths)
    return [1.0 / (num_sequences * n) if n else 0.0 for n in lengths]
