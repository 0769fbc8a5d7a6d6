"""LO-BCQ's codebooks for a model, found on its weights and on the activations that text makes of them.

The paper has one set for all layers and both operands. Here a set may also be an operand's, a layer's or a layer's operand's,
where a layer is what an engine multiplies at once: queries, keys and values share theirs, as gates and ups do. In the sample of a
set every matrix and every layer's inputs have the same share, an input as often as it is multiplied.

Calibration ends in one of many local optima, whose errors differ by several percent: more than what a set of one's own gains. So
such a set begins with the universal one, from where its error never rises until entries are rounded.

The set of a layer takes about a second. Sets are kept as they are found, and the same call goes on after a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qurl.ptq.checkpoint import folder_digest
from qurl.ptq.evaluation import Text, inputs_of, load_float32
from qurl.ptq.journal import journaled
from qurl.quantization import FORMATS, select_targets
from qurl.quantization.hadamard import rotate
from qurl.quantization.lobcq import Codebooks, CodebookSets, LayerCodebooks, Layout
from qurl.quantization.lobcq.calibration import calibrate
from qurl.quantization.lobcq.codebook_sets import EVERY_LAYER
from qurl.quantization.lobcq.samples import blocks_of
from qurl.quantization.rotation import with_rotation
from qurl.quantization.targets import engine_groups

NUM_BLOCKS, NUM_LAYER_BLOCKS = 1 << 16, 1 << 14
"""In the sample of a set for all layers, and of a layer's."""
NUM_TOKENS = 32
"""Of a document's first window, spread evenly, whose activations are looked at."""
BOTH, WEIGHTS, ACTIVATIONS = "both", "weights", "activations"


class Per(Enum):
    """What has a set of its own."""

    universal = "universal"  # nothing: one for all
    operand = "operand"
    layer = "layer"
    layer_operand = "layer_operand"

    @property
    def is_of_layers(self) -> bool:
        """Whether layers have different ones."""
        return self in (Per.layer, Per.layer_operand)

    @property
    def is_of_operands(self) -> bool:
        """Whether weights and activations have different ones."""
        return self in (Per.operand, Per.layer_operand)


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundSet:
    """A set and how it fits its sample."""

    pattern: str  # of the layers, as in CodebookSets
    operands: str  # BOTH, WEIGHTS or ACTIVATIONS
    num_blocks: int
    num_rounds: int
    first_error: float  # squared error over squared numbers, with the books that it was begun with
    error: float  # with these
    entries: list[list[int]]


def calibrated(
    model: Path,
    text: Text | None,
    layouts: Mapping[str, Layout],
    journal: Path,
    *,
    per: Per = Per.universal,
    weights: bool = True,
    rotation: int = 0,
    ignore: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[CodebookSets, list[FoundSet]]:
    """The sets, and how each fits; see model_blocks for other arguments. layouts: of WEIGHTS and ACTIVATIONS, equal unless `per`
    tells these apart. journal: file of the sets found so far. progress: (done, total) sets. Raises ValueError as model_blocks."""
    question: dict[str, Any] = {"model": folder_digest(model)}
    question |= {"layouts": {name: asdict(layout) for name, layout in layouts.items()}}
    question |= {"text": None if text is None else hashlib.sha256(json.dumps(text.documents).encode()).hexdigest()}
    question |= {"per": per.value, "weights": weights, "rotation": rotation, "ignore": list(ignore), "seed": seed}
    samples = model_blocks(model, text, layouts, per=per, weights=weights, rotation=rotation, ignore=ignore, seed=seed)
    names = [f"{operands} of {pattern}" for pattern, operands in samples]

    def find(skip: int) -> Iterator[dict[str, Any]]:
        start = None if per is Per.universal else _universal(samples, layouts, seed)
        for (pattern, operands), blocks in list(samples.items())[skip:]:
            yield asdict(_found_set(pattern, operands, blocks, layouts[_one(operands)], seed, start))

    lines = journaled(journal, question, names, find, lambda done: progress(done, len(names)))
    found = [FoundSet(**line) for line in lines]
    books = {(each.pattern, each.operands): _codebooks(each, layouts[_one(each.operands)]) for each in found}
    return CodebookSets(tuple(
        (pattern, LayerCodebooks(**{operand: books.get((pattern, operand)) or books[pattern, BOTH] for operand in layouts}))
        for pattern in dict.fromkeys(pattern for pattern, _ in books)
    )), found  # fmt: skip


@torch.no_grad()
def model_blocks(
    model: Path,
    text: Text | None,
    layouts: Mapping[str, Layout],
    *,
    per: Per = Per.universal,
    weights: bool = True,
    rotation: int = 0,
    ignore: Sequence[str] = (),
    num_blocks: int | None = None,
    seed: int = 0,
) -> dict[tuple[str, str], Tensor]:
    """By pattern of layers and operands, the sample of each set: blocks [n, L_b] in codewords, about num_blocks of them.

    They come in equal parts from the weights of the quantized layers, if asked, and from their inputs on `text`, if there is one;
    with a rotation, of what is encoded then. ignore, rotation: as in the group quantization. Raises ValueError for a layer whose
    inputs are no multiple of L_A or of the rotation, for a rotation that there is not, and a pattern that cannot be honoured."""
    with_rotation(FORMATS["lobcq"], rotation)
    loaded: Any = load_float32(model)
    linears = {name: module for name, module in loaded.named_modules() if isinstance(module, nn.Linear)}
    targets = sorted(select_targets(list(linears), ignore))
    for name in targets:
        for option, multiple in (("--array", layouts[WEIGHTS].array), ("--rotation", rotation or 1)):
            if linears[name].in_features % multiple:
                raise ValueError(
                    f"{name}: {option} {multiple} does not divide its {linears[name].in_features} input features; use a shorter "
                    "one, or --ignore the layer"
                )
    groups = engine_groups(targets) if per.is_of_layers else {EVERY_LAYER: targets}
    pattern_of = {name: pattern for pattern, names in groups.items() for name in names}
    num_blocks = num_blocks or (NUM_LAYER_BLOCKS if per.is_of_layers else NUM_BLOCKS)
    num_operands = 1 if per.is_of_operands else weights + (text is not None)
    shares = {name: -(-num_blocks // (len(groups[pattern]) * num_operands)) for name, pattern in pattern_of.items()}
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[str, str], list[Tensor]] = {}

    def keep(name: str, operand: str, blocks: Tensor) -> None:
        key = pattern_of[name], operand if per.is_of_operands else BOTH
        found.setdefault(key, []).append(_some(blocks, shares[name], generator))

    for name in targets if weights else ():
        weight = rotate(linears[name].weight.cpu(), rotation)
        rows = _some(weight, -(-shares[name] * layouts[WEIGHTS].block // weight.shape[1]), generator)
        keep(name, WEIGHTS, blocks_of(rows, weight.abs().amax().view(1), layouts[WEIGHTS]))
    inputs = {} if text is None else inputs_of(loaded, text.documents, targets, NUM_TOKENS)
    for name in inputs:
        tokens = rotate(inputs[name].cpu(), rotation)
        keep(name, ACTIVATIONS, blocks_of(tokens, tokens.abs().amax(dim=1, keepdim=True), layouts[ACTIVATIONS]))
    return {key: torch.cat(parts) for key, parts in found.items()}


def _universal(samples: Mapping[tuple[str, str], Tensor], layouts: Mapping[str, Layout], seed: int) -> Codebooks:
    """Of all samples together."""
    layout = layouts[WEIGHTS]
    blocks = torch.cat([part * (layout.largest / layouts[_one(operands)].largest) for (_, operands), part in samples.items()])
    return calibrate(_some(blocks, NUM_BLOCKS, torch.Generator().manual_seed(seed)), layout, seed).codebooks


def _found_set(pattern: str, operands: str, blocks: Tensor, layout: Layout, seed: int, start: Codebooks | None) -> FoundSet:
    found = calibrate(blocks, layout, seed, start=start)
    energy = float(blocks.double().square().sum(dim=1).mean())
    return FoundSet(
        pattern=pattern,
        operands=operands,
        num_blocks=len(blocks),
        num_rounds=len(found.objective) - 1,
        first_error=found.objective[0] / energy,
        error=found.rounded_objective / energy,
        entries=[list(book) for book in found.codebooks.entries],
    )


def _codebooks(found: FoundSet, layout: Layout) -> Codebooks:
    return Codebooks(layout=layout, entries=tuple(map(tuple, found.entries)))


def _one(operands: str) -> str:
    """Whose layout counts."""
    return WEIGHTS if operands == BOTH else operands


def _some(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` of them, drawn at random."""
    return rows[torch.randperm(len(rows), generator=generator)[:count]]
