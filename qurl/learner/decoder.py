"""How policy and critic run a decoder over packed rows."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel


def prepare_for_training(model: PreTrainedModel, activation_checkpointing: bool) -> None:
    """Dropout is off in training too: what was computed before the update and what is optimized must be one function."""
    model.eval()
    if activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():  # transformers asks the layer's own flag; its children stay without dropout
            if getattr(module, "gradient_checkpointing", False):
                module.training = True


def hidden_states(decoder: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """[B, L, H] final hidden states of the sequences that share the rows.

    decoder: the base_model of a transformers model. input_ids, position_ids [B, L] int64 as in MicroBatch."""
    shape, config = input_ids.shape, cast(Any, decoder.config)
    if "flash" in (config._attn_implementation or ""):  # varlen kernels take one row
        input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    hidden = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    return hidden.reshape(*shape, -1)
