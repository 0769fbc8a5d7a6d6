"""Supervised warm start: next-token prediction on demonstrations, in plain torch.

RL can only sharpen what a model sometimes does. The warm start gives a random model that "sometimes": it learns the format of an
answer and every way of reaching it that the demonstrations show, in the proportion in which they show it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # label of a token that is not trained on
ROW_TOKENS = 128  # a packed row, where no sequence is longer


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """A prompt and one response to it, both plain text."""

    prompt: str
    response: str


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    num_epochs: int = 1,
    batch_size: int = 32,
    learning_rate: float = 1.5e-3,
    seed: int = 0,
) -> float:
    """Trains `model` in place, in its own dtype, on the responses and their end token; returns the mean loss (nats per
    response token) over the last tenth of the steps.

    AdamW, 5 % linear warm-up, cosine decay to zero. Prompt and response are tokenized apart, as they are when the response is
    sampled. Float32 on purpose: for models this small bfloat16 autocast is no faster on a CPU, with matrix units or without.
    Raises ValueError without demonstrations and RuntimeError for a non-finite loss."""
    if not demonstrations:
        raise ValueError("no demonstrations to train on")
    encoded = [_encode(tokenizer, demonstration) for demonstration in demonstrations]
    num_steps = num_epochs * math.ceil(len(encoded) / batch_size)
    num_warmup = max(1, num_steps // 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / num_warmup, 0.5 + 0.5 * math.cos(math.pi * step / num_steps))
    )
    losses: list[float] = []
    model.train()
    with Progress(transient=True) as progress:
        task = progress.add_task("warm start", total=num_steps)
        for batch in _batches(encoded, batch_size, num_epochs, random.Random(seed)):
            input_ids, position_ids, labels = _pack(batch, tokenizer.pad_token_id)
            logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)
            if not torch.isfinite(loss):
                raise RuntimeError(f"warm start: loss {loss.item()} at step {len(losses)}; lower learning_rate={learning_rate}")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"warm start, loss {losses[-1]:.3f}")
    model.eval()
    tail = losses[-max(1, num_steps // 10) :]
    return sum(tail) / len(tail)


def _encode(tokenizer: PreTrainedTokenizerBase, demonstration: Demonstration) -> tuple[list[int], list[int]]:
    """Token ids and labels, equally long; labels are IGNORED on the prompt."""
    prompt = tokenizer.encode(demonstration.prompt)
    response = [*tokenizer.encode(demonstration.response), tokenizer.eos_token_id]
    return prompt + response, [IGNORED] * len(prompt) + response


def _batches(encoded: list, batch_size: int, num_epochs: int, rng: random.Random) -> Iterator[list]:
    """Random batches; every epoch sees every sequence once. Not sorted by length, which would sort by kind of response too: a
    model that sees short answers in one step and long ones in the next forgets their proportion."""
    for _ in range(num_epochs):
        order = rng.sample(encoded, len(encoded))
        yield from (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def _pack(batch: list, pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input ids, position ids and labels, [rows, T] int64, several sequences to a row, longest first into the first row with room.

    Positions restart with each sequence, by which transformers keeps sequences of a row apart. The first token of a sequence has
    no label, or the token before it, of another sequence, would be trained to predict it."""
    batch = sorted(batch, key=lambda pair: -len(pair[0]))
    length = max(len(batch[0][0]), ROW_TOKENS)
    rows: list[list] = []
    for pair in batch:
        row = next((row for row in rows if sum(len(ids) for ids, _ in row) + len(pair[0]) <= length), None)
        if row is None:
            rows.append(row := [])
        row.append(pair)
    shape = (len(rows), max(sum(len(ids) for ids, _ in row) for row in rows))
    input_ids, positions, labels = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    for r, row in enumerate(rows):
        start = 0
        for ids, targets in row:
            span = slice(start, start := start + len(ids))
            input_ids[r, span], labels[r, span] = torch.tensor(ids), torch.tensor([IGNORED, *targets[1:]])
            positions[r, span] = torch.arange(len(ids))
    return input_ids, positions, labels
