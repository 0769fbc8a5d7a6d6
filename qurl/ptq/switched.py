"""A model whose Ax-BxP precision is switched layer by layer, for the many measurements of a search.

Weights are encoded once, a switch decodes only what changes, and what full precision says of a text is remembered. Products are
those of the numbers that codes stand for, in float32, and so differ from the format's exact integer sums in the last bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from qurl.ptq.perplexity import DocumentLoss, Rounded, decoded_linear, document_losses
from qurl.quantization import FORMATS, with_precision
from qurl.quantization.axbxp import AxBxP, Precision

REMEMBERED_BYTES = 1 << 30
"""Of the full-precision logits, 4 bytes for each token and word of the vocabulary; those beyond are computed again each time."""


class SwitchedModel:
    """In memory twice: in full precision and switched."""

    def __init__(self, full_precision: Any, targets: Sequence[str]) -> None:
        """full_precision: a transformers model, float32; targets: names of its linear layers. Raises ValueError as encode does."""
        self.exact = _Remembered(full_precision)
        self.targets = list(targets)
        self.model = copy.deepcopy(full_precision)
        self.wires = {name: FORMATS["axbxp"].encode(full_precision.get_submodule(name).weight) for name in targets}
        self.weights: dict[str, tuple[Precision, Tensor]] = {}  # decoded last, of each layer

    def losses(
        self, precision: str | Mapping[str, str] | None, documents: Sequence[Sequence[list[int]]]
    ) -> Iterator[DocumentLoss]:
        """Of each document, as encode_documents gives them, under a quantization.precision; None: in full precision.

        Raises ValueError as with_precision."""
        if precision is None:
            return document_losses(self.exact, self.exact, documents)
        self._switch(precision)
        return document_losses(self.model, self.exact, documents)

    def _switch(self, precision: str | Mapping[str, str]) -> None:
        assigned = with_precision(FORMATS["axbxp"], precision, self.targets)
        rounded: dict[Any, Rounded] = {}
        for name in self.targets:
            format = assigned.of_layer(name)
            assert isinstance(format, AxBxP)
            wanted = format.precision
            shared = rounded.setdefault((wanted.block_bits, wanted.activation, wanted.digits), Rounded(format))
            self._set_layer(name, format, shared)

    def _set_layer(self, name: str, format: AxBxP, rounded: Rounded) -> None:
        layer, wire = self.model.get_submodule(name), self.wires[name]
        if format.precision.drops_low_product:
            layer.forward = partial(format.linear, wire=wire, bias=layer.bias)
            return
        if name not in self.weights or self.weights[name][0] != format.precision:
            self.weights[name] = format.precision, format.decode(wire)
        layer.forward = partial(decoded_linear, rounded, self.weights[name][1], layer.bias)


class _Remembered:
    """A model's answers, each computed once while they fit into REMEMBERED_BYTES."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, model.device
        self.answers: dict[bytes, Any] = {}
        self.num_bytes = 0

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        key = input_ids.cpu().numpy().tobytes() + bytes(str(tuple(input_ids.shape)), "ascii")
        if key in self.answers:
            return self.answers[key]
        answer = self.model(input_ids=input_ids, use_cache=use_cache)
        self.num_bytes += answer.logits.nbytes
        if self.num_bytes <= REMEMBERED_BYTES:
            self.answers[key] = answer
        return answer
