"""Records that cross a boundary between parts of qurl; no behavior beyond derived properties.

    Prompt -> RolloutGroup[Rollout] -> ScoredGroup -> TrainingSample -> MicroBatch

Everything is a Python list until packing; only a MicroBatch holds tensors. Four policies are never confused:
`rollout_` the quantized policy that sampled, `old_` full precision at the same weight version, no prefix the policy being
optimized, `ref_` the frozen reference. All logprobs are natural logarithms. Shapes: R response tokens, T tokens of one
sequence, B rows of a micro-batch, L columns of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # records must import where torch is absent
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One problem, rendered and tokenized."""

    prompt_id: str  # unique and reproducible within a run, e.g. "e0-r000017"
    token_ids: list[int]
    text: str  # the rendered prompt, for people
    ground_truth: str
    data_source: str
    extra: Mapping[str, Any] = field(default_factory=dict)  # what else the row carried, handed to the reward function
    truth: Any = None  # the ground truth as stored where it is a list or an object, of which ground_truth is the text; else None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeptTokens:
    """The tokens that top-p and top-k left to draw from, one set for each of N sampled tokens.

    A set takes 4 bytes an entry, at most one bit for each entry of the vocabulary. qurl.kept_tokens packs and unpacks."""

    sizes: np.ndarray  # [N] int32, >= 1
    data: np.ndarray  # uint8, set after set: ascending ids as int32, or a bit per token of the vocabulary where that is shorter
    vocab_size: int

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeptTokens):
            return NotImplemented
        return all(
            getattr(self, name).tobytes() == getattr(other, name).tobytes() for name in ("sizes", "data")
        ) and self.vocab_size == other.vocab_size

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled response."""

    sample_index: int  # position in its group, 0..G-1
    token_ids: list[int]  # [R] ends with the stop token where finish_reason is "stop"
    rollout_logprobs: list[float]  # [R] nats, under the distribution really sampled from
    weight_versions: list[int]  # [R] the weights that sampled each token
    finish_reason: str  # "stop" | "length"
    text: str  # detokenized response without special tokens
    engine_id: str
    seed: int
    kept_tokens: KeptTokens | None = None  # of the R tokens, where rollout.top_p or top_k cut the distribution

    @property
    def weight_version(self) -> int:
        """Oldest weights that produced any token; -1 for an empty response."""
        return min(self.weight_versions, default=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """All G samples of one prompt, ordered by sample_index."""

    prompt: Prompt
    rollouts: list[Rollout]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardResult:
    """What the reward pool says of one response. Exactly one of value and error is set."""

    value: float | None
    error: str | None = None  # "timeout after 10 s", "ValueError: ..."; counted, never silently 0
    elapsed_s: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)  # numbers a reward function returned beside its score

    @property
    def is_right(self) -> bool:
        """Whether the response counts as right: by the part `acc` (verl's) where there is one, else by a reward above 0."""
        return self.value is not None and self.parts.get("acc", self.value) > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredGroup:
    """A group with one reward result per rollout, in the same order."""

    group: RolloutGroup
    rewards: list[RewardResult]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSample:
    """One sequence to train on; lists of length T (prompt, then response)."""

    sample_id: str  # f"{prompt_id}/{sample_index}"
    token_ids: list[int]
    loss_mask: list[bool]  # True where the policy chose the token
    rollout_logprobs: list[float]  # 0.0 where loss_mask is False
    advantages: list[float]  # 0.0 where loss_mask is False; a learner with a critic computes its own
    reward: float
    weight_version: int  # oldest weights that produced any trained token
    kept_tokens: KeptTokens | None = None  # of the trained tokens, in order; None: drawn from the whole vocabulary


@dataclass(kw_only=True, slots=True)
class MicroBatch:
    """Packed rows; several sequences may share a row. Position t of a tensor speaks of the token at t, i.e. logprobs[b, t] is
    the logprob of input_ids[b, t] given what precedes it in the same sequence (0 where loss_mask is False)."""

    input_ids: Tensor  # [B, L] int64, padding 0
    position_ids: Tensor  # [B, L] int64, restarts at 0 with each sequence
    segment_ids: Tensor  # [B, L] int64, index of the sequence in sample_indices, -1 on padding
    loss_mask: Tensor  # [B, L] bool
    rollout_logprobs: Tensor  # [B, L] float32
    advantages: Tensor  # [B, L] float32
    sample_indices: list[int]  # segment id -> index into the list of samples this batch was packed from
    kept_tokens: KeptTokens | None = None  # of the trained tokens, row by row; stays on the host
    old_logprobs: Tensor | None = None  # [B, L] float32, filled by the learner before the update
    ref_logprobs: Tensor | None = None  # [B, L] float32, filled by the learner when a KL term needs it
    old_values: Tensor | None = None  # [B, L] float32, the critic's before the update, of what precedes the token at t
    returns: Tensor | None = None  # [B, L] float32, what the critic is to say; both only with a critic


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRecord:
    """One wire tensor in the manifest of a weight update."""

    name: str  # Hugging Face name, e.g. "model.layers.0.mlp.up_proj.weight_scale"
    dtype: str  # "int8", "float8_e4m3fn", "bfloat16", "float32"
    shape: tuple[int, ...]
    num_bytes: int
    fingerprint: int  # signed 64 bit, qurl.sync.fingerprint
