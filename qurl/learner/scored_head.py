"""The output layer as one module call: hidden states in, a logprob and an entropy per trained token out.

Logits of all trained tokens would be the largest tensor of training, so they exist for one chunk of tokens at a time: in forward,
and once more in backward. The loop over chunks is inside the call and not around it. Under ZeRO-3 every call of a module gathers
its weight from all ranks, and ranks have different numbers of tokens: calls for each chunk would leave some ranks waiting for
partners that never come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qurl.kept_tokens import split_kinds
from qurl.types import KeptTokens

LOGIT_BYTES = 256 << 20
"""Bound on one chunk of float32 logits; with a single chunk nothing is recomputed in backward."""


class ScoredHead(nn.Module):
    """Scores targets with the weight (and bias) of an output layer, which stays the owner of both in checkpoints."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, head: Any, *, temperature: float, entropy_gradient: bool):
        """head: a linear output layer. temperature: divides the logits, > 0. entropy_gradient: the entropy has a gradient."""
        super().__init__()
        self.register_parameter("weight", head.weight)  # parameters of its own, so that ZeRO-3 gathers them for this call
        self.register_parameter("bias", getattr(head, "bias", None))
        self._temperature = temperature
        self._entropy_gradient = entropy_gradient

    def forward(self, hidden: Tensor, targets: Tensor, kept: KeptTokens | None = None) -> tuple[Tensor, Tensor]:
        """Return ([N] logprobs of targets, [N] entropies in nats), float32. hidden: [N, H]. targets: [N] int64.

        kept: the set of tokens that each target was drawn from; the distribution is renormalized over it."""
        size = max(1, LOGIT_BYTES // (4 * self.weight.shape[0]))
        logprobs, entropy = _Score.apply(
            hidden, targets, self.weight, self.bias, kept, self._temperature, self._entropy_gradient, size
        )
        return logprobs, entropy

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Save nothing: the output layer saves its parameters."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load nothing: the parameters are the output layer's."""


class _Score(torch.autograd.Function):
    """Logprobs and entropies of N tokens in chunks of `size`, with z = log softmax(logits / temperature) and p = exp(z):

        logprob = z[target]                    d logprob / d logits = (onehot(target) - p) / temperature
        entropy = H = -sum(p * z)              d entropy / d logits = -p * (z + H) / temperature

    Gradients of weight and bias are summed over chunks in float32, whatever their dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept_tokens: KeptTokens | None,
        temperature: float,
        entropy_gradient: bool,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(targets), dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        kept = None
        for rows in _chunks(len(targets), size):
            log_probs = _log_probs(hidden[rows], weight, bias, temperature, kept_tokens, rows)
            logprobs[rows] = log_probs.gather(1, targets[rows, None])[:, 0]
            entropy[rows] = -(log_probs.exp() * log_probs).sum(dim=-1)
            kept = log_probs if len(targets) <= size else None
        ctx.save_for_backward(hidden, targets, weight, bias, entropy if entropy_gradient else None, kept)
        ctx.kept_tokens, ctx.temperature, ctx.size = kept_tokens, temperature, size
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, weight, bias, entropy, kept = ctx.saved_tensors
        hidden_wanted, _, weight_wanted, bias_wanted, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if hidden_wanted else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if weight_wanted else None
        grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if bias_wanted else None
        for rows in _chunks(len(targets), ctx.size):
            log_probs = kept if kept is not None else _log_probs(
                hidden[rows], weight, bias, ctx.temperature, ctx.kept_tokens, rows
            )
            probs = log_probs.exp()
            grad = probs * -grad_logprobs[rows, None]
            if entropy is not None:
                grad -= probs * (log_probs + entropy[rows, None]) * grad_entropy[rows, None]
            grad.scatter_add_(1, targets[rows, None], grad_logprobs[rows, None])
            grad = grad.div_(ctx.temperature).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0, dtype=torch.float32)
        grads = (grad_hidden, None, _like(grad_weight, weight), _like(grad_bias, bias))
        return (*grads, None, None, None, None)


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows; a single empty one where there are no rows."""
    yield from (slice(first, first + size) for first in range(0, max(1, count), size))


def _log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, kept: KeptTokens | None, rows: slice
) -> Tensor:
    """Return [n, V] float32 log probabilities; the only place that turns hidden states into a distribution.

    kept: of all tokens, of which these are `rows`. Outside of it stands the lowest finite number: a probability of 0 all the same,
    and no gradient, but -inf would make 0 * -inf of the entropy nan."""
    logits = functional.linear(hidden, weight, bias).float()
    if temperature != 1.0:
        logits = logits.div_(temperature)
    if kept is not None:
        logits = logits.masked_fill_(_is_cut(kept, rows, logits), torch.finfo(torch.float32).min)
    return torch.log_softmax(logits, dim=-1)


def _is_cut(kept: KeptTokens, rows: slice, logits: Tensor) -> Tensor:
    """Return [n, V] bool: what is not in the sets of `rows`, on the device of logits [n, V]."""
    ids_of, ids, bitmaps_of, bitmaps = (
        torch.from_numpy(part).to(logits.device) for part in split_kinds(kept, rows.start, rows.start + len(logits))
    )
    is_cut = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
    is_cut[ids_of, ids] = False
    bits = bitmaps[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device) & 1
    is_cut[bitmaps_of, : kept.vocab_size] = bits.flatten(1)[:, : kept.vocab_size] == 0
    return is_cut


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """The gradient in the dtype of its parameter."""
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)
