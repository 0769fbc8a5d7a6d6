"""Which policy is trained."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A Hugging Face causal language model."""

    path: str = MISSING  # local folder or hub name
    revision: str | None = None
    tokenizer: str | None = None  # where it differs from path
    trust_remote_code: bool = False
    attn_implementation: str = "sdpa"  # transformers' own name
