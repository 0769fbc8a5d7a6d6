"""The cheapest precision whose loss stays within a bound: one for the network, then for each layer and operand.

    num_weights = engine_matrices({name: weight.numel() for name, weight in linears.items()})
    found = search(num_weights, loss, bound, candidates)
    quantization.precision = found.settings                     # pattern -> setting

`loss` is whatever must not grow too much, measured on the whole network: perplexity, KL to full precision. It is called with the
precision of every layer and is all that takes time; what it said is kept in `journal`, so that a search with the same journal goes
on where another ended.

    network      candidates from the cheapest on, all layers alike, until one meets the bound
    refinement   one operand of one layer gives up a block; of all such steps those that save most for the loss they add come first,
                 and each is kept where the loss of all together stays within the bound; round after round until none is

The paper searches in this order; how it steps is not known to us. It trains again, which is left out here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

from qurl.quantization.axbxp.cost import Cost, cost, network_cost
from qurl.quantization.axbxp.precision import Kept, Precision
from qurl.quantization.targets import engine_pattern

Loss = Callable[[Mapping[str, Precision]], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A layer's precision that was taken, and what holds for the network from there on."""

    layer: str
    precision: Precision
    loss: float
    cost: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The end of a search. Costs never rise along the steps; no loss is above the bound."""

    network: Precision  # the best single one
    network_loss: float
    network_cost: float
    layers: dict[str, Precision]
    loss: float
    cost: float
    steps: list[Step]
    num_evaluations: int  # of the loss, those of an earlier search not among them

    @property
    def settings(self) -> dict[str, str]:
        """As quantization.precision takes them, where the layers were named by patterns."""
        return {name: str(precision) for name, precision in self.layers.items()}


def products(cost: Cost) -> float:
    """What a search makes small if it is told nothing else."""
    return cost.products


def cheaper(precision: Precision, weight_group: int = 16, activation_group: int = 1) -> list[Precision]:
    """The precisions with one block less of one operand. Where it had all, which ones it keeps is chosen by groups of this size."""
    found = []
    if precision.weight.blocks > 1:
        weight = _one_less(precision.weight, precision.num_blocks, weight_group)
        found.append(replace(precision, weight=weight, drops_low_product=False))
    if precision.activation.blocks > 1:
        activation = _one_less(precision.activation, precision.num_blocks, activation_group)
        found.append(replace(precision, activation=activation, drops_low_product=False))
    return found


def _one_less(kept: Kept, count: int, group: int) -> Kept:
    return Kept(kept.blocks - 1, group if kept.blocks == count else kept.group)


def search(
    num_weights: Mapping[str, float],
    loss: Loss,
    bound: float,
    candidates: Sequence[Precision],
    *,
    objective: Callable[[Cost], float] = products,
    steps: Callable[[Precision], Iterable[Precision]] = cheaper,
    journal: MutableMapping[str, float] | None = None,
) -> Found:
    """Precisions of layers with so many weights, the names of which are the caller's.

    bound: the largest loss that is accepted; a loss of NaN never is. candidates: for the network. objective: what of a cost is made
    small. steps: what a layer may become next. journal: description of precisions -> loss. Raises ValueError without layers or
    candidates, and where no candidate meets the bound."""
    if not num_weights or not candidates:
        raise ValueError(f"a search needs layers and candidates; got {len(num_weights)} and {len(candidates)}")
    run = _Run(num_weights, loss, objective, {} if journal is None else journal)
    network = _cheapest(run, bound, candidates)
    layers = dict.fromkeys(num_weights, network)
    network_loss, price = run.loss(layers), run.cost(layers)
    taken: list[Step] = []
    refused: set[tuple[str, Precision]] = set()
    while True:
        found = _round(run, layers, bound, steps, refused)
        if not found:
            break
        taken += found
        layers |= {step.layer: step.precision for step in found}
    return Found(
        network=network, network_loss=network_loss, network_cost=price, layers=layers, loss=run.loss(layers),
        cost=run.cost(layers), steps=taken, num_evaluations=run.num_evaluations,
    )  # fmt: skip


@dataclass(slots=True)
class _Run:
    num_weights: Mapping[str, float]
    measure: Loss
    objective: Callable[[Cost], float]
    journal: MutableMapping[str, float]
    num_evaluations: int = 0

    def loss(self, layers: Mapping[str, Precision]) -> float:
        key = describe(layers)
        if key not in self.journal:
            self.journal[key] = float(self.measure(dict(layers)))
            self.num_evaluations += 1
        return self.journal[key]

    def cost(self, layers: Mapping[str, Precision]) -> float:
        return self.objective(network_cost(layers, self.num_weights))


def _cheapest(run: _Run, bound: float, candidates: Sequence[Precision]) -> Precision:
    losses = {}
    for precision in sorted(candidates, key=lambda each: run.objective(cost(each))):
        losses[precision] = run.loss(dict.fromkeys(run.num_weights, precision))
        if losses[precision] <= bound:
            return precision
    best = min(losses, key=lambda each: (math.isnan(losses[each]), losses[each]))
    raise ValueError(f"none of {len(losses)} precisions meets bound={bound:g}; the best, {best}, has {losses[best]:g}")


def _round(
    run: _Run, start: Mapping[str, Precision], bound: float, steps: Callable[[Precision], Iterable[Precision]],
    refused: set[tuple[str, Precision]],
) -> list[Step]:
    """The steps that are taken from `start`, at most one of each layer; notes those that are not."""
    base_loss, base_cost = run.loss(start), run.cost(start)
    ranked = []
    for layer in start:
        for precision in steps(start[layer]):
            changed = {**start, layer: precision}
            saved = base_cost - run.cost(changed)
            if saved <= 0 or (layer, precision) in refused:
                continue
            changed_loss = run.loss(changed)
            if not changed_loss <= bound:
                refused.add((layer, precision))
                continue
            added = changed_loss - base_loss
            ranked.append((math.inf if added <= 0 else saved / added, saved, layer, precision))
    layers, taken = dict(start), []
    for _, _, layer, precision in sorted(ranked, key=lambda move: (-move[0], -move[1], move[2], str(move[3]))):
        if layers[layer] != start[layer]:
            continue
        changed = {**layers, layer: precision}
        if not run.loss(changed) <= bound:
            refused.add((layer, precision))
            continue
        layers = changed
        taken.append(Step(layer=layer, precision=precision, loss=run.loss(layers), cost=run.cost(layers)))
    return taken


def describe(layers: Mapping[str, Precision]) -> str:
    """One line, the same for the same precisions: the setting where all layers have one, else JSON."""
    settings = {name: str(layers[name]) for name in sorted(layers)}
    return settings.popitem()[1] if len(set(settings.values())) == 1 else json.dumps(settings)


def engine_matrices(num_weights: Mapping[str, float]) -> dict[str, float]:
    """Patterns of quantization.precision for the matrices of an engine that fuses q/k/v and gate/up, with their weights; from those
    of the Hugging Face modules."""
    found: dict[str, float] = {}
    for name, count in num_weights.items():
        pattern = engine_pattern(name)
        found[pattern] = found.get(pattern, 0) + count
    return found
