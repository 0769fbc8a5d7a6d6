"""What an engine is asked for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """vLLM's sampling parameters, the ones that matter for a policy gradient."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    returns_kept_tokens: bool = False  # what top_p and top_k left, for training; its engine must be built with rollout.cuts

    def returns_kept_tokens_of(self, vocab_size: int) -> bool:
        """Whether something is cut from a vocabulary of this size, and asked for."""
        return self.returns_kept_tokens and (self.top_p < 1 or 0 < self.top_k < vocab_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """All samples of one prompt. request_id names the work, not the attempt: a prompt dispatched again keeps it, and its seeds."""

    request_id: str
    token_ids: list[int]
    seeds: list[int]  # one per sample; equal seeds would give equal samples
    sampling: Sampling


def sample_seed(run_seed: int, request_id: str, sample_index: int) -> int:
    """A seed in [0, 2**31) that depends on nothing but its arguments, so that a resumed or re-dispatched sample is the same."""
    digest = hashlib.blake2b(f"{run_seed}/{request_id}/{sample_index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF
