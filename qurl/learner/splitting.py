"""Which rank trains which sample in which mini-batch; runs on the driver."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from qurl.types import TrainingSample


def split_for_ranks(
    samples: Sequence[TrainingSample], num_mini_batches: int, num_ranks: int
) -> list[list[list[TrainingSample]]]:
    """shares[rank][mini_batch]: every sample once; deterministic.

    A mini-batch holds whole prompts (neighbors with the same prompt id), in order, the same number of them give or take one.
    Within it, samples go to ranks longest first to the rank with the fewest tokens so far; a rank keeps the order it was
    given. Dynamic sampling can leave fewer prompts than mini-batches: then there are as many mini-batches as prompts.
    Raises ValueError without samples."""
    if not samples:
        raise ValueError("there are no samples to train on")
    prompts = [list(group) for _, group in groupby(samples, key=lambda sample: prompt_id(sample.sample_id))]
    num_mini_batches = min(num_mini_batches, len(prompts))
    shares: list[list[list[TrainingSample]]] = [[] for _ in range(num_ranks)]
    for i in range(num_mini_batches):
        first, last = i * len(prompts) // num_mini_batches, (i + 1) * len(prompts) // num_mini_batches
        mini_batch = [sample for prompt in prompts[first:last] for sample in prompt]
        for share, part in zip(shares, _balance(mini_batch, num_ranks), strict=True):
            share.append(part)
    return shares


def prompt_id(sample_id: str) -> str:
    """The prompt of f"{prompt_id}/{sample_index}"."""
    return sample_id.rpartition("/")[0]


def _balance(samples: list[TrainingSample], num_ranks: int) -> list[list[TrainingSample]]:
    tokens = [0] * num_ranks
    owned: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in sorted(range(len(samples)), key=lambda i: -len(samples[i].token_ids)):
        rank = min(range(num_ranks), key=lambda r: tokens[r])
        tokens[rank] += len(samples[index].token_ids)
        owned[rank].append(index)
    return [[samples[index] for index in sorted(indices)] for indices in owned]
