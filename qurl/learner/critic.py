"""The critic of PPO on one rank: what a response will earn, seen from each of its tokens.

It is a decoder of its own with a number for an output layer, trained by its own DeepSpeed engine on the same packed micro-batches.
It is fitted to what the responses earned that the pool really sampled, without a correction for their precision."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from qurl.algorithms import clipped_value_loss
from qurl.algorithms.masked import token_means
from qurl.config import CriticConfig, LearnerConfig, ModelConfig
from qurl.learner.decoder import hidden_states, prepare_for_training
from qurl.learner.engine import initialize, load_engine, save_engine
from qurl.learner.huggingface import load_model
from qurl.observability.metrics import Metric
from qurl.types import MicroBatch

TAG = "critic"
"""Folder of its engine's files in a checkpoint."""


class ValueModel(nn.Module):
    """A decoder that says one number per trained token: the value of the state before it."""

    def __init__(self, model: PreTrainedModel, *, activation_checkpointing: bool = False):
        """model: its output layer is left behind."""
        super().__init__()
        prepare_for_training(model, activation_checkpointing)
        self.decoder = model.base_model
        self.head = ValueHead(model.config.get_text_config().hidden_size)

    def forward(self, input_ids: Tensor, position_ids: Tensor, loss_mask: Tensor) -> Tensor:
        """[B, L] float32, 0 where loss_mask is False. input_ids, position_ids [B, L] int64 and loss_mask [B, L] bool as in
        MicroBatch."""
        rows, columns = loss_mask.nonzero(as_tuple=True)
        values = self.head(hidden_states(self.decoder, input_ids, position_ids)[rows, columns - 1])
        return torch.zeros(loss_mask.shape, dtype=torch.float32, device=loss_mask.device).index_put((rows, columns), values)


class ValueHead(nn.Module):
    """[N, H] to [N], in float32: bfloat16 would leave values eight bits. It begins with 0 for every state, so that the first
    advantages are the outcomes themselves (verl draws it at random)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(1, hidden_size)), nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden.float(), self.weight.float(), self.bias.float())[:, 0]


class Critic:
    """The value model, its optimizer and its loss."""

    def __init__(self, config: CriticConfig, model: ModelConfig, learner: LearnerConfig, device: torch.device):
        """model, learner: those of the policy. Raises ValueError and OSError as load_model does."""
        decoder = load_model(config.model(model), "critic" if config.path else "model")
        value_model = ValueModel(decoder, activation_checkpointing=learner.activation_checkpointing)
        self.engine = initialize(value_model, config.learner(learner), device)
        self._clip = config.value_clip

    @torch.no_grad()
    def values(self, batch: MicroBatch) -> Tensor:
        """[B, L] at the weights of now."""
        return self.engine(batch.input_ids, batch.position_ids, batch.loss_mask)

    def loss(self, batch: MicroBatch, num_tokens: int) -> tuple[Tensor, dict[str, Metric]]:
        """(this micro-batch's part of the mini-batch loss, metrics). num_tokens: trained ones of the mini-batch, over all ranks."""
        assert batch.old_values is not None and batch.returns is not None
        values = self.engine(batch.input_ids, batch.position_ids, batch.loss_mask)
        loss, is_clipped = clipped_value_loss(values, batch.old_values, batch.returns, batch.loss_mask, self._clip)
        means = token_means(batch.loss_mask, {"critic/loss": loss, "critic/clip_fraction": is_clipped.float()})
        return loss.sum() / max(1, num_tokens), dict(means)

    def save(self, folder: Path) -> None:
        """This rank's part of a checkpoint."""
        save_engine(self.engine, folder, TAG)

    def load(self, folder: Path) -> None:
        """Continue from save(). Raises FileNotFoundError where parts are missing."""
        load_engine(self.engine, folder, TAG)
