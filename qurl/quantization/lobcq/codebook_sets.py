"""Which layer has which codebooks: a set for its weights and a set for its activations.

The paper's set is universal. A set for either operand, or for each layer, is nearer to the numbers that it encodes and costs
N_c * 16 * B_c bits more for each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qurl.quantization.lobcq.codebooks import Codebooks, codebooks_of, refuse_other_hash, save_codebooks
from qurl.quantization.lobcq.layout import Layout
from qurl.quantization.targets import matches_pattern

KEY = "quantization.codebooks"
VERSION = 2
"""Of the content that holds more than a universal set."""
EVERY_LAYER = "re:.*"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCodebooks:
    """Of one layer. Raises ValueError where the operands' layouts differ in more than the bits of a codeword."""

    weights: Codebooks
    activations: Codebooks

    def __post_init__(self) -> None:
        weights, activations = self.weights.layout, self.activations.layout
        if replace(activations, codeword_bits=weights.codeword_bits) != weights:
            raise ValueError(
                f"LO-BCQ codebooks of weights have {weights}, those of activations {activations}; only codeword_bits may differ"
            )


@dataclass(frozen=True)
class CodebookSets:
    """By pattern, as in qurl.quantization.select_targets, of which the first that matches a layer counts.

    Raises ValueError where there is none, or layouts differ from one layer to another."""

    layers: tuple[tuple[str, LayerCodebooks], ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("LO-BCQ codebooks of no layer")
        (first, chosen), *others = self.layers
        for pattern, other in others:
            if (other.weights.layout, other.activations.layout) != (chosen.weights.layout, chosen.activations.layout):
                raise ValueError(f"LO-BCQ codebooks of {pattern!r} and {first!r} have different layouts")

    @classmethod
    def universal(cls, codebooks: Codebooks) -> CodebookSets:
        """One set for both operands of all layers."""
        return cls.of_every_layer(LayerCodebooks(weights=codebooks, activations=codebooks))

    @classmethod
    def of_every_layer(cls, codebooks: LayerCodebooks) -> CodebookSets:
        """The same for all."""
        return cls(((EVERY_LAYER, codebooks),))

    @property
    def layout(self) -> Layout:
        """Of the weights."""
        return self.layers[0][1].weights.layout

    @property
    def universal_set(self) -> Codebooks | None:
        """Where there is no other."""
        (pattern, codebooks), *others = self.layers
        is_universal = not others and pattern == EVERY_LAYER and codebooks.weights == codebooks.activations
        return codebooks.weights if is_universal else None

    def of_layer(self, name: str) -> LayerCodebooks:
        """Of a Hugging Face module. Raises ValueError where no pattern matches it, or one is no regex."""
        for pattern, codebooks in self.layers:
            if matches_pattern(name, pattern, KEY):
                return codebooks
        raise ValueError(
            f"{KEY} has no codebooks for {name}; calibrate them on this model with `qurl calibrate`, or add the layer to "
            "quantization.ignore"
        )

    def of_layers(self, names: Sequence[str]) -> LayerCodebooks:
        """Of modules that an engine runs as one matrix. Raises ValueError where they have different ones, and as of_layer."""
        first, *others = (self.of_layer(name) for name in names)
        if any(other != first for other in others):
            raise ValueError(
                f"{KEY} has different codebooks for {', '.join(names)}, which an engine runs as one matrix; give all the same, as "
                "`qurl calibrate` does"
            )
        return first

    def check_layers(self, layers: Collection[str]) -> None:
        """Raises ValueError where a pattern matches none of a model's quantized modules."""
        for pattern, _ in self.layers:
            if not any(matches_pattern(name, pattern, KEY) for name in layers):
                raise ValueError(
                    f"{KEY} has codebooks for {pattern!r}, which matches none of the {len(layers)} quantized layers; calibrate "
                    "them on this model, with the same layers to ignore"
                )

    @cached_property
    def sha256(self) -> str:
        """Of all but itself; a universal set has its own."""
        if (only := self.universal_set) is not None:
            return only.sha256
        return hashlib.sha256(json.dumps(self._stated, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def content(self) -> dict[str, Any]:
        """As plain data that codebook_sets_of reads: what a file holds, and what travels to engines on other machines."""
        if (only := self.universal_set) is not None:
            return only.content
        return {**self._stated, "sha256": self.sha256}

    @property
    def _stated(self) -> dict[str, Any]:
        chosen = self.layers[0][1]
        return {
            "version": VERSION,
            "layouts": {"weights": asdict(chosen.weights.layout), "activations": asdict(chosen.activations.layout)},
            "layers": [
                {"pattern": pattern, "weights": _lines(books.weights), "activations": _lines(books.activations)}
                for pattern, books in self.layers
            ],
        }


def save_codebook_sets(sets: CodebookSets, path: Path, command: str) -> None:
    """Write a file whose content codebook_sets_of reads. command: how the codebooks were made."""
    if (only := sets.universal_set) is not None:
        save_codebooks(only, path, command)
    else:
        path.write_text(json.dumps({"command": command, **sets.content}, indent=0) + "\n", encoding="utf-8")


def codebook_sets_of(content: Any, source: str) -> CodebookSets:
    """The inverse of CodebookSets.content. source: where it comes from, for errors. Raises ValueError where it is damaged or has
    another hash than it states."""
    if not isinstance(content, dict) or "version" not in content:
        return CodebookSets.universal(codebooks_of(content, source))
    if content["version"] != VERSION:
        raise ValueError(
            f"{source} has version {content['version']!r} of LO-BCQ's codebooks, and this qurl reads {VERSION}; make it again with "
            "`qurl calibrate`, or install the qurl that wrote it"
        )
    try:
        layouts = {operand: Layout(**content["layouts"][operand]) for operand in ("weights", "activations")}
        sets = CodebookSets(tuple(
            (str(layer["pattern"]), LayerCodebooks(**{name: _codebooks(layer[name], layouts[name]) for name in layouts}))
            for layer in content["layers"]
        ))  # fmt: skip
        expected = str(content["sha256"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} holds no LO-BCQ codebooks: {type(error).__name__}: {error}") from error
    refuse_other_hash(sets.sha256, expected, source)
    return sets


def _lines(codebooks: Codebooks) -> list[str]:
    """A book each: numbers with spaces between."""
    return [" ".join(map(str, book)) for book in codebooks.entries]


def _codebooks(lines: list[str], layout: Layout) -> Codebooks:
    return Codebooks(layout=layout, entries=tuple(tuple(int(entry) for entry in line.split()) for line in lines))
