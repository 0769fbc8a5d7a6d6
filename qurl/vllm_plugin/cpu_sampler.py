"""The sampler of qurl's engines on the CPU: one uniform number per token, and only the sampled token's log-probability.

vLLM draws by Gumbel-max, i.e. a random number and two logarithms for each entry of the vocabulary, and writes a float32
log-probability for each: with 150,000 tokens and small models a third of a decode step. Here a token is drawn by inverting the
cumulative distribution: the softmax is summed in blocks, a uniform number picks the block and then the token within it.

The number is a hash of the request's seed and the token's position. What a request samples therefore depends on nothing else: not
on the batch it is in, nor on a preemption, nor on a prompt that is computed in chunks. Rows are worked on one by one, each in the
cache of a core and each with the same operations, so that their values do not depend on the batch either.

Where top-p or top-k cut the distribution, the sampler also keeps which tokens were left, for the learner to renormalize over."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput, SamplingMaskLists
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from qurl.vllm_plugin.compat import is_temperature_sampling, num_known_tokens

BLOCK = 256


def draw(logits: Tensor, uniforms: Tensor, temperatures: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
    """Sample each row of softmax(logits / temperature): tokens int64 [B, 1] and their log-probabilities float32 [B, 1].

    logits: [B, V] of any floating dtype, computed with in float32; -inf is never drawn, a row with nan gives nan. uniforms: float64
    [B] in [0, 1). temperatures: [B], > 0; None is 1 everywhere."""
    num_rows, size = logits.shape
    scaled = torch.zeros(-(-size // BLOCK) * BLOCK, dtype=torch.float32)  # one row at a time; zero behind the vocabulary
    row, blocks = scaled[:size], scaled.view(-1, BLOCK)
    sums, top = (torch.empty(num_rows, width, dtype=torch.float32) for width in (len(blocks), 1))
    for index in range(num_rows):
        row.copy_(logits[index])
        if temperatures is not None:
            row.div_(temperatures[index])
        torch.amax(row, 0, out=top[index, 0])
        row.sub_(top[index]).exp_()
        torch.sum(blocks, 1, out=sums[index])
    cumulative = sums.double().cumsum_(1)
    total = cumulative[:, -1:]
    target = uniforms[:, None] * total
    block = _first_above(cumulative, target)
    candidates = block * BLOCK + torch.arange(BLOCK)
    is_outside = candidates >= size
    candidates.clamp_(max=size - 1)
    scaled = logits.gather(1, candidates).float()
    if temperatures is not None:
        scaled /= torch.tensor(temperatures)[:, None]
    weights = (scaled - top).exp_().masked_fill_(is_outside, 0)
    within = _first_above(weights.double().cumsum_(1), target - (cumulative - sums).gather(1, block))
    return candidates.gather(1, within), scaled.gather(1, within) - top - total.log().float()


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index [B, 1] of the first entry of each row [B, N] above target [B, 1], and whatever the rounding one that adds something."""
    below_total = torch.nextafter(cumulative[:, -1:], torch.zeros((), dtype=cumulative.dtype))
    return torch.searchsorted(cumulative, torch.minimum(target, below_total), right=True).clamp_(max=cumulative.shape[1] - 1)


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1), of 53 bits, for the token at this position of the sequence."""
    digest = hashlib.blake2b(b"%d %d" % (seed, position), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * 2.0**-53


class RequestSeed:
    """Stands for a request's torch.Generator. vLLM takes a draw back after a chunk of a prompt, which those of the CPU refuse."""

    __slots__ = ("_seed",)

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def initial_seed(self) -> int:
        return self._seed

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        """There is nothing to take back."""


class QurlSampler(Sampler):
    """vLLM's sampler with `draw` in the place of Gumbel-max, and a short way for batches without penalties and the like."""

    def __init__(self, runner: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.runner = runner
        self.topk_topp_sampler.forward = self._filter_and_draw
        self._kept: SamplingMaskLists | None = None

    def forward(self, logits: Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any) -> SamplerOutput:
        """vLLM's contract."""
        self._kept = None
        if args or kwargs or self.logprobs_mode != "processed_logprobs" or not is_temperature_sampling(sampling_metadata):
            return super().forward(logits, sampling_metadata, *args, **kwargs)
        assert sampling_metadata.temperature is not None, "vLLM leaves it out where all requests are greedy"
        is_plain = all(value == 1 for value in sampling_metadata.temperature.tolist())
        temperatures = None if is_plain else sampling_metadata.temperature.tolist()
        if sampling_metadata.top_k is not None or sampling_metadata.top_p is not None:
            logits = self.apply_temperature(logits.float(), sampling_metadata.temperature, all_random=True)
            logits, temperatures = self._cut(logits, sampling_metadata.top_k, sampling_metadata.top_p), None
        tokens, logprobs = draw(logits, self._uniforms(sampling_metadata.generators, len(logits)), temperatures)
        tensors = None
        if sampling_metadata.max_num_logprobs is not None:
            pairs = zip(logits, logits.gather(1, tokens), strict=True)
            ranks = torch.stack([torch.count_nonzero(row >= chosen) for row, chosen in pairs])
            tensors = LogprobsTensors(tokens.int(), logprobs, ranks)
        return SamplerOutput(sampled_token_ids=tokens.int(), logprobs_tensors=tensors)

    def _filter_and_draw(
        self, logits: Tensor, generators: dict[int, Any], k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Contract of TopKTopPSampler: tokens int64 [B], and what is reported of all tokens. logits: float32 [B, V]."""
        logits = self._cut(logits, k, p)
        tokens = draw(logits, self._uniforms(generators, len(logits)))[0].squeeze(1)
        processed = {"processed_logits": lambda: logits, "processed_logprobs": lambda: self.compute_logprobs(logits)}
        return tokens, processed.get(self.logprobs_mode, lambda: None)()

    def take_kept(self) -> SamplingMaskLists | None:
        """What was left to draw from in each row of the last batch, once; None where no request cut anything."""
        kept, self._kept = self._kept, None
        return kept

    def _cut(self, logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
        """logits [B, V] float32 with -inf for the tokens that top-k and top-p remove; what they leave is noted."""
        logits = apply_top_k_top_p(logits, k, p)
        if k is not None or p is not None:
            is_left = logits > -math.inf
            offsets = torch.nn.functional.pad(is_left.sum(1).cumsum(0), (1, 0))
            self._kept = SamplingMaskLists(is_left.nonzero()[:, 1].int().numpy(), offsets.numpy())
        return logits

    def _uniforms(self, generators: dict[int, Any], num_rows: int) -> Tensor:
        """One number per row, float64 [B]; from the engine's own generator for requests without a seed."""
        make = torch.empty if len(generators) == num_rows else torch.rand
        uniforms = make(num_rows, dtype=torch.float64)
        positions = num_known_tokens(self.runner)
        for row, generator in generators.items():
            seed = generator.initial_seed()
            generators[row] = RequestSeed(seed)
            uniforms[row] = uniform(seed, int(positions[row]))
        return uniforms
