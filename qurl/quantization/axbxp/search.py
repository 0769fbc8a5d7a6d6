"""The cheapest precision whose loss stays within a bound: one for the network, then for each layer and operand.

    num_weights = engine_matrices({name: weight.numel() for name, weight in linears.items()})
    network = cheapest(candidates, num_weights, loss, bound)
    rungs = ladder(num_weights, loss, bound, network)         # from `network` everywhere down to the cheapest, layer by layer

`loss` is whatever must not grow too much, measured on the whole network, such as the divergence from full precision. It is called
with the precision of every layer and is all that takes time.

    network      candidates from the cheapest on, all layers alike, until one meets the bound
    refinement   rounding errors of different operands are independent, so what they add to the loss adds up. Each operand of each
                 layer is therefore measured alone, where no other noise drowns it: with one block less than the network has, and
                 all else whole. With more or fewer blocks it adds a fourth or four times as much for each bit, as the power of
                 rounding errors does. By these estimates a layer has a best precision for every price of the loss, whatever other
                 layers have, and what all have together as the price rises is a ladder. An estimate of fewer blocks that is used
                 at its end is replaced by a measurement, until none is left; how far down the bound is met, is measured too

The paper searches in this order, its refinement is greedy, and it trains again. Here nothing is trained, and no greedy rounds are
needed: a round that measures every step on top of the noise of all others mostly measures that noise."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from qurl.quantization.axbxp.cost import cost
from qurl.quantization.axbxp.precision import Kept, Precision
from qurl.quantization.targets import engine_pattern

GROUPS = (16, 1)
"""Weights and activations that share a choice of blocks, where the network keeps all of them and so has made none."""

Layers = dict[str, Precision]
Loss = Callable[[Mapping[str, Precision]], float]


def cheapest(candidates: Sequence[Precision], layers: Iterable[str], loss: Loss, bound: float) -> Precision:
    """The one with fewest products that meets the bound where all layers have it; NaN never does. ValueError where none does."""
    losses = {}
    for precision in sorted(candidates, key=lambda each: cost(each).products):
        losses[precision] = loss(dict.fromkeys(layers, precision))
        if losses[precision] <= bound:
            return precision
    best = min(losses, key=lambda each: (math.isnan(losses[each]), losses[each]))
    raise ValueError(f"none of {len(losses)} precisions meets bound={bound:g}; the best, {best}, has {losses[best]:g}")


def ladder(num_weights: Mapping[str, float], loss: Loss, bound: float, network: Precision) -> list[Layers]:
    """`network` everywhere, then precisions each cheaper than the one before, of its blocks and digits; the last meets the bound.

    num_weights: of the layers, the names of which are the caller's. bound: the largest loss that is accepted; NaN never is.
    network: meets it."""
    alone = _Alone(num_weights, loss, network)
    rungs = _rungs(alone, bound)
    while guessed := alone.guessed(rungs[-1]):
        for operand in guessed:
            alone.measure(*operand)
        rungs = _rungs(alone, bound)
    return rungs[: 1 + last_within(lambda index: loss(rungs[index]) <= bound, len(rungs) - 1)]


def last_within(is_within: Callable[[int], bool], last: int) -> int:
    """The highest of 0 to `last` that is within, by bisection from the end; 0 is, and is not asked about."""
    within, beyond, asked = 0, last + 1, last
    while beyond - within > 1:
        within, beyond = (asked, beyond) if is_within(asked) else (within, asked)
        asked = (within + beyond) // 2
    return within


@dataclass(frozen=True, kw_only=True, slots=True)
class _Option:
    """A precision of a layer."""

    layer: str
    precision: Precision
    products: float  # share of the network's, relative to INT8
    added: float  # to the loss; an estimate
    price: float = 0.0  # of a step to it: loss over products saved


class _Alone:
    """What weights (0) or activations (1) of a layer add to the loss with fewer blocks, while all else keeps all."""

    def __init__(self, num_weights: Mapping[str, float], loss: Loss, network: Precision) -> None:
        self.num_weights, self.total = num_weights, sum(num_weights.values())
        self.loss, self.network, self.all = loss, network, network.num_blocks
        self.whole = dict.fromkeys(num_weights, self._precision([self.all, self.all]))
        self.whole_loss = loss(self.whole)
        self.added: dict[tuple[str, int], dict[int, float]] = {}  # by operand and blocks: measured
        for name in num_weights:
            for index, kept in enumerate((network.weight, network.activation)):
                self.added[name, index] = {}
                self.measure(name, index, max(1, kept.blocks - 1))

    def measure(self, name: str, index: int, blocks: int) -> None:
        both = [self.all, self.all]
        both[index] = blocks
        added = self.loss(self.whole | {name: self._precision(both)}) - self.whole_loss
        self.added[name, index][blocks] = math.inf if math.isnan(added) else added

    def guessed(self, layers: Layers) -> list[tuple[str, int, int]]:
        """(layer, operand, blocks) where these are fewer than were measured. With more, what an estimate is off by is small too."""
        chosen = [
            (name, index, kept.blocks)
            for name, precision in layers.items() for index, kept in enumerate((precision.weight, precision.activation))
        ]  # fmt: skip
        return [(name, index, blocks) for name, index, blocks in chosen if blocks < min(self.added[name, index])]

    def steps(self, name: str) -> Iterator[_Option]:
        """From all blocks on, each time what adds least for what it saves: the corners of a convex hull, so that prices rise."""
        options = [self.option(name, blocks) for blocks in product(range(1, self.all + 1), repeat=2)]
        here = options.pop()
        while options := [each for each in options if each.products < here.products and each.added < math.inf]:
            priced = [replace(each, price=(each.added - here.added) / (here.products - each.products)) for each in options]
            here = min(priced, key=lambda each: (each.price, each.products))
            yield here

    def option(self, name: str, blocks: Sequence[int]) -> _Option:
        precision = self._precision(blocks)
        return _Option(
            layer=name, precision=precision, products=cost(precision).products * self.num_weights[name] / self.total,
            added=sum(self._estimate(name, index, count) for index, count in enumerate(blocks)),
        )  # fmt: skip

    def _estimate(self, name: str, index: int, blocks: int) -> float:
        known = self.added[name, index]
        nearest = min(known, key=lambda count: abs(count - blocks))
        return 0.0 if blocks == self.all else known[nearest] * 4.0 ** (self.network.block_bits * (nearest - blocks))

    def _precision(self, blocks: Sequence[int]) -> Precision:
        """The network's, with so many blocks of weights and of activations."""
        weight, activation = (
            Kept(count, None if count == self.all else group if own.blocks == self.all else own.group)
            for count, own, group in zip(blocks, (self.network.weight, self.network.activation), GROUPS, strict=True)
        )
        return replace(self.network, weight=weight, activation=activation, drops_low_product=False)


def _rungs(alone: _Alone, bound: float) -> list[Layers]:
    """The network's precision, then what is cheaper and within the bound by the estimates."""
    rungs = [dict.fromkeys(alone.num_weights, alone.network)]
    chosen = {name: alone.option(name, [alone.all, alone.all]) for name in alone.num_weights}
    for option in heapq.merge(*map(alone.steps, alone.num_weights), key=lambda each: each.price):
        chosen[option.layer] = option
        if not alone.whole_loss + sum(each.added for each in chosen.values()) <= bound:
            break
        if sum(each.products for each in chosen.values()) < cost(alone.network).products:
            rungs.append({name: each.precision for name, each in chosen.items()})
    return rungs


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
