"""Samples to packed micro-batches: several sequences in a row, rows of one length, a bound on tokens.

Padding is what packing is for: responses differ in length by an order of magnitude, so one sequence per row would train
mostly on padding. Each micro-batch is as wide as its longest sample, shorter ones share rows (first fit, longest first).
Sequences of a row do not see each other: `position_ids` restart with each one, and transformers builds the
block-diagonal causal (or sliding-window) mask of every attention implementation from just that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qurl.algorithms import sequence_sums
from qurl.kept_tokens import join_sets
from qurl.types import MicroBatch, TrainingSample


def pack(samples: Sequence[TrainingSample], max_tokens: int) -> list[MicroBatch]:
    """Micro-batches of B rows x L columns with B * L <= max_tokens that hold every sample once.

    A sample longer than max_tokens gets a micro-batch of its own, since the response is already paid for; `qurl plan` refuses
    configurations where that can happen. The result depends only on the lengths and their order.
    Raises ValueError for a sample whose lists differ in length, that is empty, or that trains its first token (nothing
    precedes it, so it has no logprob), and where some samples have kept tokens and others none."""
    for sample in samples:
        _check(sample)
    if len({sample.kept_tokens is None for sample in samples}) > 1:
        raise ValueError("some samples come with the tokens that top-p or top-k kept and others do not; all or none must")
    waiting = sorted(range(len(samples)), key=lambda i: -len(samples[i].token_ids))
    batches = []
    while waiting:
        length = len(samples[waiting[0]].token_ids)
        rows, waiting = _first_fit(waiting, samples, length, max(1, max_tokens // length))
        batches.append(_to_micro_batch(rows, samples, length))
    return batches


def empty_micro_batch() -> MicroBatch:
    """One row that trains nothing; a rank runs it to stay in step with ranks that have more micro-batches."""
    return _to_micro_batch([[]], [], 2)


def padding_fraction(batches: Sequence[MicroBatch]) -> float:
    """Share of the packed positions that hold no token; 0.0 without batches."""
    total = sum(batch.input_ids.numel() for batch in batches)
    return sum(int((batch.segment_ids < 0).sum()) for batch in batches) / total if total else 0.0


def spread(values: Sequence[float], batch: MicroBatch) -> Tensor:
    """[B, L] float32: each position the value of its sequence, 0 on padding. values: one per sample the batch was packed from."""
    by_segment = torch.tensor([*(values[index] for index in batch.sample_indices), 0.0], dtype=torch.float32)
    return by_segment.to(batch.segment_ids.device)[batch.segment_ids]  # -1, padding, is the last


def collect(per_token: Tensor, batch: MicroBatch) -> list[float]:
    """The sum of [B, L] values over the trained tokens of each sequence, in the order of batch.sample_indices."""
    sums = sequence_sums(per_token, batch.loss_mask, batch.segment_ids)
    by_segment = torch.zeros(len(batch.sample_indices) + 1, dtype=sums.dtype, device=sums.device)
    by_segment[batch.segment_ids.flatten()] = sums.flatten()  # -1, padding, is the last
    return by_segment[:-1].tolist()


def _check(sample: TrainingSample) -> None:
    lengths = [len(x) for x in (sample.token_ids, sample.loss_mask, sample.rollout_logprobs, sample.advantages)]
    if len(set(lengths)) != 1 or lengths[0] == 0:
        raise ValueError(
            f"sample {sample.sample_id!r}: token_ids, loss_mask, rollout_logprobs, advantages have {lengths} entries; "
            "they must be equally long and not empty"
        )
    if sample.loss_mask[0]:
        raise ValueError(f"sample {sample.sample_id!r}: loss_mask[0] is True, but nothing precedes the first token")
    num_trained, kept = sum(sample.loss_mask), sample.kept_tokens
    if kept is not None and len(kept.sizes) != num_trained:
        raise ValueError(f"sample {sample.sample_id!r}: {len(kept.sizes)} sets of kept tokens for {num_trained} trained tokens")


def _first_fit(
    waiting: list[int], samples: Sequence[TrainingSample], length: int, max_rows: int
) -> tuple[list[list[int]], list[int]]:
    """(rows of sample indices, indices left over) for one micro-batch; `waiting` runs from long to short."""
    rows: list[list[int]] = []
    room: list[int] = []
    left = []
    for index in waiting:
        size = len(samples[index].token_ids)
        row = next((r for r, free in enumerate(room) if free >= size), None)
        if row is None and len(rows) == max_rows:
            left.append(index)
            continue
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(length)
        rows[row].append(index)
        room[row] -= size
    return rows, left


def _to_micro_batch(rows: list[list[int]], samples: Sequence[TrainingSample], length: int) -> MicroBatch:
    shape = (len(rows), length)
    batch = MicroBatch(
        input_ids=torch.zeros(shape, dtype=torch.int64),
        position_ids=torch.zeros(shape, dtype=torch.int64),
        segment_ids=torch.full(shape, -1, dtype=torch.int64),
        loss_mask=torch.zeros(shape, dtype=torch.bool),
        rollout_logprobs=torch.zeros(shape, dtype=torch.float32),
        advantages=torch.zeros(shape, dtype=torch.float32),
        sample_indices=[index for row in rows for index in row],
    )
    kept = [sets for index in batch.sample_indices if (sets := samples[index].kept_tokens) is not None]
    batch.kept_tokens = join_sets(kept) if kept else None  # rows, and samples within them, are in the order of loss_mask.nonzero()
    segment = 0
    for row, indices in enumerate(rows):
        start = 0
        for index in indices:
            sample = samples[index]
            stop = start + len(sample.token_ids)
            batch.input_ids[row, start:stop] = torch.tensor(sample.token_ids)
            batch.position_ids[row, start:stop] = torch.arange(stop - start)
            batch.segment_ids[row, start:stop] = segment
            batch.loss_mask[row, start:stop] = torch.tensor(sample.loss_mask)
            batch.rollout_logprobs[row, start:stop] = torch.tensor(sample.rollout_logprobs)
            batch.advantages[row, start:stop] = torch.tensor(sample.advantages)
            start = stop
            segment += 1
    return batch
