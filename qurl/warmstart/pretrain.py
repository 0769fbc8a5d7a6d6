"""A language model from nothing: next-token prediction on whole documents, in plain torch, resumable.

Documents are laid end to end, each with its end token, and cut into rows, so a row may begin in the middle of a document and hold
parts of several; nothing is padded and every token but the first of a row is predicted once per epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

DECAY = 0.3  # of the steps, at the end, over which the learning rate falls to zero
WARM_UP = 50  # steps


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """How long and how fast."""

    num_tokens: int
    row_tokens: int = 512
    batch_rows: int = 2
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    seed: int = 0
    save_every_steps: int = 50

    @property
    def num_steps(self) -> int:
        """num_tokens over the tokens of a step, rounded up."""
        return -(-self.num_tokens // (self.row_tokens * self.batch_rows))

    @property
    def num_constant_steps(self) -> int:
        """Steps before the learning rate decays; until then runs of any length are the same run."""
        return int((1 - DECAY) * self.num_steps)


def pretrain(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    config: PretrainConfig,
    state_file: Path,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Trains `model` in place, in its own dtype; returns the mean loss of the last 50 steps, nats per token.

    documents: token ids, end token included. state_file: where the state is kept; a later call with the same arguments goes on
    from there and reaches the same weights, and so does one with another num_tokens before the learning rate decays. progress:
    called with the number of steps done and the loss of the last one. AdamW, a short warm-up, a constant learning rate and a
    linear decay at the end. Raises ValueError where there is less text than a step takes or the state is of other settings,
    RuntimeError for a non-finite loss."""
    optimizer = torch.optim.AdamW(_groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    losses: list[float] = _restore(state_file, config, model, optimizer)
    rows = _Rows(documents, config)
    model.train()
    for step in range(len(losses), config.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.num_steps)
        ids = rows.batch(step)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        if not torch.isfinite(loss):
            raise RuntimeError(f"pretraining: loss {loss.item()} at step {step}; lower learning_rate={config.learning_rate}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress(step + 1, losses[-1])
        if (step + 1) % config.save_every_steps == 0:
            _save(state_file, config, model, optimizer, losses)
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


class _Rows:
    """Batches by step: each epoch is a new order of the documents."""

    def __init__(self, documents: Sequence[Sequence[int]], config: PretrainConfig) -> None:
        self.documents = documents
        self.config = config
        self.steps_per_epoch = sum(map(len, documents)) // (config.row_tokens * config.batch_rows)
        if not self.steps_per_epoch:
            raise ValueError(f"the text has fewer than the {config.row_tokens * config.batch_rows} tokens of one step")
        self.epoch = -1
        self.stream = torch.empty(0)

    def batch(self, step: int) -> Tensor:
        """int64 [batch_rows, row_tokens]."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            order = random.Random(self.config.seed * 1_000_003 + epoch).sample(range(len(self.documents)), len(self.documents))
            self.stream = torch.tensor([token for i in order for token in self.documents[i]])
            self.epoch = epoch
        size = self.config.row_tokens * self.config.batch_rows
        return self.stream[index * size : (index + 1) * size].view(self.config.batch_rows, -1)


def _groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Norms and biases do not decay."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _schedule(step: int, num_steps: int) -> float:
    """Of the learning rate: up over WARM_UP steps, constant, down over the last DECAY of the steps."""
    return min((step + 1) / WARM_UP, 1.0, (num_steps - step) / max(1.0, DECAY * num_steps))


def _save(
    path: Path, config: PretrainConfig, model: PreTrainedModel, optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    partial = path.with_suffix(".partial")
    state = {"config": asdict(config), "model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
    torch.save(state, partial)
    partial.replace(path)


def _restore(path: Path, config: PretrainConfig, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> list[float]:
    """The losses so far; none without a state."""
    if not path.is_file():
        return []
    state = torch.load(path, weights_only=True)
    previous = PretrainConfig(**state["config"])
    is_longer_or_shorter = replace(previous, num_tokens=config.num_tokens) == config
    if previous != config and not (is_longer_or_shorter and len(state["losses"]) <= _common_steps(previous, config)):
        raise ValueError(f"{path} is the state of another pretraining, {state['config']}; delete it or use those settings")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["losses"]


def _common_steps(a: PretrainConfig, b: PretrainConfig) -> int:
    return min(a.num_constant_steps, b.num_constant_steps)
