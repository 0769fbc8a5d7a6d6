"""The pool of vLLM engines and what it samples."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

MAX_NUM_SEQS = 256
"""Of an engine's step. vLLM alone would take 128 for an engine that is no server; a decode step costs little more with 256."""

MAX_NUM_BATCHED_TOKENS = {"cuda": 8192, "cpu": 2048}
"""Of an engine's step. On a GPU 8,192 tokens of prompts fill the matrix products; on a CPU more than 2,048 only delay decoding."""


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """Sampling and engines."""

    num_prompts_per_step: int = 32
    num_samples_per_prompt: int = 8  # G
    temperature: float = 1.0
    top_p: float = 1.0  # draws from the fewest tokens that have this much probability; they travel with each token, see cuts
    top_k: int = -1  # draws from so many tokens; -1: all
    max_response_tokens: int = 1024
    stop_token_ids: list[int] = field(default_factory=list)  # besides the tokenizer's end of sequence
    # dtype of what engines do not quantize, and of the weight stream: auto, bfloat16, float16 or float32. auto: bfloat16, but
    # float32 on a CPU without bfloat16 instructions and float16 on a GPU before Ampere
    dtype: str = "auto"
    max_staleness: int = 0  # weight versions a sample may lag behind; 0: synchronous
    num_engines: int = 1
    tensor_parallel_size: int = 1
    engine_args: dict[str, Any] = field(default_factory=dict)  # handed to vLLM under vLLM's names
    engine_timeout_s: float = 300.0  # an engine that returns no token for so long is replaced
    max_engine_restarts: int = 10  # over the run; then it stops

    @property
    def cuts(self) -> bool:
        """Whether tokens are drawn from a part of the vocabulary.

        The tokens that were left then travel with each sampled one, and the learner renormalizes over the same ones: all logprobs,
        entropy and KL are those of the cut distribution."""
        return self.top_p < 1 or self.top_k > 0

    @property
    def max_num_seqs(self) -> int:
        """Sequences that an engine computes in one step: what pool, plan and engine count. engine_args.max_num_seqs, else
        MAX_NUM_SEQS, or fewer where engine_args.max_num_batched_tokens leaves each less than one token."""
        asked = self.engine_args.get("max_num_seqs")
        tokens = self.engine_args.get("max_num_batched_tokens", MAX_NUM_SEQS)
        return int(asked) if asked is not None else min(MAX_NUM_SEQS, int(tokens))

    def max_num_batched_tokens(self, device: str) -> int:
        """Tokens that an engine computes in one step, on "cpu" or "cuda": engine_args.max_num_batched_tokens, else
        MAX_NUM_BATCHED_TOKENS, or one for each sequence."""
        asked = self.engine_args.get("max_num_batched_tokens")
        return int(asked) if asked is not None else max(MAX_NUM_BATCHED_TOKENS[device], self.max_num_seqs)

    @property
    def asked_dtype(self) -> str:
        """engine_args.dtype where it is given, else dtype. qurl.hardware.engine_dtype resolves auto."""
        return self.engine_args.get("dtype", self.dtype)


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """Other numbers from an iteration on; null: as in the stage before. What the learner is built from cannot change in a run."""

    from_step: int = 0  # the iteration that this stage begins with, > 0: what precedes the first stage is `rollout` itself
    num_prompts_per_step: int | None = None
    num_samples_per_prompt: int | None = None
    max_response_tokens: int | None = None

    def apply(self, rollout: RolloutConfig) -> RolloutConfig:
        """`rollout` with what this stage changes."""
        changes = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "from_step"}
        return replace(rollout, **{name: value for name, value in changes.items() if value is not None})
