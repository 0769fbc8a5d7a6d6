"""Tiny decoders with random weights, of the sizes the tests need."""

import torch
import transformers
from transformers import PreTrainedModel

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def tiny_decoder(family: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A float32 `<family>ForCausalLM`, e.g. "Qwen2"; norms and biases are random too, so nothing hides behind ones and zeros."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.15)
    return model


def tokens() -> torch.Tensor:
    """[2, 9] token ids."""
    return torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(1))
