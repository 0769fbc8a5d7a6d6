"""The loss of a model on documents, with the reference arithmetic of a format in its linear layers.

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
    for name, wire in wires.items():
        module: Any = model.get_submodule(name)
        if weights and activations:
            module.forward = _forward(quantization, wire, module.bias)
            continue
        weight = quantization.decode(wire).to(module.weight.device) if weights else module.weight.detach().float()
        module.forward = partial(_half_quantized, quantization if activations else None, weight, module.bias)


def encode_documents(documents: Sequence[str], tokenizer: Any, context: int) -> list[list[list[int]]]:
    """Windows of at most `context` token ids of each document that has two tokens or more; each document ends with the
    tokenizer's end token, where it has one. Raises ValueError where none is left."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = [[*tokenizer.encode(document), *end] for document in documents]
    windows = [[ids[i : i + context] for i in range(0, len(ids), context) if len(ids) - i > 1] for ids in encoded]
    if not (windows := [cut for cut in windows if cut]):
        raise ValueError("--text: no document has two tokens")
    return windows


@torch.no_grad()
def document_losses(
    model: Any, documents: Sequence[Sequence[list[int]]], progress: Callable[[int], None] = lambda done: None
) -> Iterator[DocumentLoss]:
    """The loss of each document, in order, some documents at a time; documents: as encode_documents gives them."""
    done = 0
    for batch in _batches(documents):
        windows = [window for document in batch for window in document]
        losses = iter(_window_losses(model, windows))
        for document in batch:
            yield DocumentLoss(loss=sum(next(losses) for _ in document), num_tokens=sum(len(window) - 1 for window in document))
        done += len(batch)
        progress(done)


def _forward(quantization: QuantizationFormat, wire: Mapping[str, Tensor], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    if isinstance(quantization, GroupedFormat):  # the same numbers, decoded once
        return partial(quantization.linear_decoded, weight=quantization.decode(wire), bias=bias)
    return partial(quantization.linear, wire=wire, bias=bias)


def _half_quantized(quantization: QuantizationFormat | None, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return functional.linear(x if quantization is None else decoded_activations(quantization, x), weight, bias)


def decoded_activations(quantization: QuantizationFormat, x: Tensor) -> Tensor:
    """The numbers that the codes of activations [..., I] stand for, float32."""
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


def _window_losses(model: Any, windows: Sequence[list[int]]) -> list[float]:
    """Nats, summed over all tokens but the first of each window. Padding stands behind, where causal attention does not look."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(window) for window in windows], batch_first=True).to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double()
    return [float(row[: len(window) - 1].sum()) for row, window in zip(losses, windows, strict=True)]
