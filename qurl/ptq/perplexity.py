"""The loss of a model on documents, with the reference arithmetic of a format in its linear layers.

Quantization moves each token's loss up or down, mostly at random, and the loss itself only by what does not cancel. The divergence
from full precision, which is that loss for text that the full-precision model itself would write, has no such noise.

The model runs in transformers, in float32; a quantized layer multiplies what the wire tensors stand for with activations rounded by
the format's rule. An engine differs from that in the dtype of everything else and in the order of sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qurl.quantization import QuantizationFormat
from qurl.quantization.grouped import GroupedFormat

BATCH_TOKENS = 2048
"""Of windows that are run together, padding included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentLoss:
    """One document under one model."""

    loss: float  # nats, summed over its predicted tokens
    num_tokens: int  # predicted: all but the first of each window
    divergence: float  # nats, KL(full precision || this model) of the next token, summed over the same places


def replace_linears(
    model: nn.Module,
    quantization: QuantizationFormat,
    wires: Mapping[str, Mapping[str, Tensor]],
    *,
    weights: bool = True,
    activations: bool = True,
) -> None:
    """Let the modules named by `wires` answer with the format's arithmetic; wires: module -> wire tensors.

    weights, activations: what is quantized; one of them alone tells where an error comes from."""
    rounded: dict[int, Rounded] = {}
    for name, wire in wires.items():
        module: Any = model.get_submodule(name)
        format = quantization.of_layer(name)
        if weights and activations and not isinstance(format, GroupedFormat):
            module.forward = partial(format.linear, wire=wire, bias=module.bias)
            continue
        weight = format.decode(wire) if weights else module.weight.detach().float()
        shared = rounded.setdefault(id(format), Rounded(format))
        module.forward = partial(decoded_linear, shared if activations else None, weight, module.bias)


def encode_documents(documents: Sequence[str], tokenizer: Any, context: int, option: str = "--text") -> list[list[list[int]]]:
    """Windows of at most `context` token ids of each document that has two tokens or more; each document ends with the
    tokenizer's end token, where it has one. Raises ValueError where none is left."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = [[*tokenizer.encode(document), *end] for document in documents]
    windows = [[ids[i : i + context] for i in range(0, len(ids), context) if len(ids) - i > 1] for ids in encoded]
    if not (windows := [cut for cut in windows if cut]):
        raise ValueError(f"{option}: no document has two tokens")
    return windows


@torch.no_grad()
def document_losses(
    model: Any, full_precision: Any, documents: Sequence[Sequence[list[int]]], progress: Callable[[int], None] = lambda done: None
) -> Iterator[DocumentLoss]:
    """The loss of each document, in order, some documents at a time; documents: as encode_documents gives them."""
    done = 0
    for batch in _batches(documents):
        windows = [window for document in batch for window in document]
        found = iter(_window_losses(model, full_precision, windows))
        for document in batch:
            losses, divergences = zip(*(next(found) for _ in document), strict=True)
            yield DocumentLoss(
                loss=sum(losses), num_tokens=sum(len(window) - 1 for window in document), divergence=sum(divergences)
            )
        done += len(batch)
        progress(done)


class Rounded:
    """Activations as a format rounds them; layers that share an input, as queries, keys and values do, round it once."""

    def __init__(self, quantization: QuantizationFormat) -> None:
        self.quantization = quantization
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.last is None or self.last[0] is not x:
            self.last = x, decoded_activations(self.quantization, x)
        return self.last[1]


def decoded_linear(rounded: Rounded | None, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """The product of the numbers that codes stand for, float32; rounded: None leaves the activations as they are."""
    return functional.linear(x.float() if rounded is None else rounded(x), weight, bias)


def decoded_activations(quantization: QuantizationFormat, x: Tensor) -> Tensor:
    """The numbers that the codes of activations [..., I] stand for, float32."""
    if isinstance(quantization, GroupedFormat):
        return quantization.round_activations(x)
    codes, scale = quantization.quantize_activations(x)
    width = -(-x.shape[-1] // scale.shape[-1])
    return codes.float() * scale.repeat_interleave(width, dim=-1)[..., : x.shape[-1]]


def _batches(documents: Sequence[Sequence[list[int]]]) -> Iterator[list[Sequence[list[int]]]]:
    """Consecutive documents, as many as fit into BATCH_TOKENS, at least one."""
    batch: list[Sequence[list[int]]] = []
    for document in documents:
        windows = [window for other in (*batch, document) for window in other]
        if batch and len(windows) * max(map(len, windows)) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def _window_losses(model: Any, full_precision: Any, windows: Sequence[list[int]]) -> list[tuple[float, float]]:
    """Nats and divergence, summed over all tokens but the first of each window. Padding stands behind, where causal attention does
    not look."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(window) for window in windows], batch_first=True).to(model.device)
    logprobs = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    losses = -logprobs.gather(2, ids[:, 1:, None])[..., 0].double()
    if full_precision is model:
        divergences = torch.zeros_like(losses)
    else:
        exact = full_precision(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        divergences = functional.kl_div(logprobs, exact, reduction="none", log_target=True).sum(-1).double()
    counts = [len(window) - 1 for window in windows]
    return [(float(a[:n].sum()), float(b[:n].sum())) for a, b, n in zip(losses, divergences, counts, strict=True)]
