"""What quantization does to the outputs of each layer on text: an error of a weight says little where few inputs are large."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional

from qurl.ptq.evaluation import Replace, Text, inputs_of, load_float32

NUM_TOKENS = 64
"""Of a document's first window, spread evenly."""


@torch.no_grad()
def output_errors(
    model: Path, text: Text, replace: Replace, modules: Sequence[str], progress: Callable[[int], None] = lambda done: None
) -> dict[str, float]:
    """|x W^T - y|^2 / |x W^T|^2 of each of `modules`, in float32 without biases, over the inputs x [T, I] that it has in the model
    of the folder `model`; y [T, O]: its outputs after `replace`. progress: modules done."""
    full_precision = load_float32(model)
    quantized = copy.deepcopy(full_precision)
    replace(quantized)
    found = {}
    for name, x in inputs_of(full_precision, text.documents, modules, NUM_TOKENS).items():
        exact, rounded = full_precision.get_submodule(name), quantized.get_submodule(name)
        noise = rounded(x) - exact(x)
        found[name] = float(noise.square().sum() / functional.linear(x, exact.weight).square().sum())
        progress(len(found))
    return found
