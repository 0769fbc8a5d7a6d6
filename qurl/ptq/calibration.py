"""What LO-BCQ's codebooks are calibrated on, taken from a model: its weights, and the activations that text makes of them.

The codebooks remain one set for all layers and both operands, as the paper has them; every matrix and every layer's inputs have
the same share in the sample, an input as often as it is multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qurl.ptq.evaluation import Text, inputs_of, load_float32
from qurl.quantization import FORMATS, select_targets
from qurl.quantization.hadamard import rotate
from qurl.quantization.lobcq import Layout
from qurl.quantization.lobcq.samples import blocks_of
from qurl.quantization.rotation import with_rotation

NUM_BLOCKS = 1 << 16
NUM_TOKENS = 32
"""Of a document's first window, spread evenly, whose activations are looked at."""


@torch.no_grad()
def model_blocks(
    model: Path,
    text: Text | None,
    layout: Layout,
    *,
    weights: bool = True,
    rotation: int = 0,
    ignore: Sequence[str] = (),
    num_blocks: int = NUM_BLOCKS,
    seed: int = 0,
) -> Tensor:
    """About num_blocks blocks [n, L_b] in codewords, in equal parts from the weights of the quantized layers, if asked, and from
    their inputs on `text`, if there is one; with a rotation, of what is encoded then. ignore, rotation: as in the group
    quantization.

    Raises ValueError for a layer whose inputs are no multiple of L_A or of the rotation, for a rotation that there is not, and a
    pattern that cannot be honoured."""
    with_rotation(FORMATS["lobcq"], rotation)
    loaded: Any = load_float32(model)
    linears = {name: module for name, module in loaded.named_modules() if isinstance(module, nn.Linear)}
    targets = sorted(select_targets(list(linears), ignore))
    for name in targets:
        for option, multiple in (("--array", layout.array), ("--rotation", rotation or 1)):
            if linears[name].in_features % multiple:
                raise ValueError(
                    f"{name}: {option} {multiple} does not divide its {linears[name].in_features} input features; use a shorter "
                    "one, or --ignore the layer"
                )
    share = -(-num_blocks // (len(targets) * (weights + (text is not None))))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name in targets if weights else ():
        weight = rotate(linears[name].weight.cpu(), rotation)
        rows = _some(weight, -(-share * layout.block // weight.shape[1]), generator)
        found.append(_some(blocks_of(rows, weight.abs().amax().view(1), layout), share, generator))
    inputs = {} if text is None else inputs_of(loaded, text.documents, targets, NUM_TOKENS)
    for name in inputs:
        tokens = rotate(inputs[name].cpu(), rotation)
        found.append(_some(blocks_of(tokens, tokens.abs().amax(dim=1, keepdim=True), layout), share, generator))
    return torch.cat(found)


def _some(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` of them, drawn at random."""
    return rows[torch.randperm(len(rows), generator=generator)[:count]]
