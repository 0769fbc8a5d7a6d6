"""Which policy is trained."""

from __future__ import annotations

from dataclasses import dataclass
from os.path import expanduser


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A Hugging Face causal language model."""

    path: str = "???"  # local folder or hub name; "???" is OmegaConf's mark of a mandatory value
    revision: str | None = None
    tokenizer: str | None = None  # where it differs from path
    trust_remote_code: bool = False
    max_position_embeddings: int | None = None  # instead of config.json's; rotary embeddings go on beyond it
    attn_implementation: str = "sdpa"  # transformers' own name

    def __post_init__(self) -> None:
        """A leading ~ is the home folder, as for datasets and output_dir."""
        self.path = expanduser(self.path)
        self.tokenizer = self.tokenizer and expanduser(self.tokenizer)
