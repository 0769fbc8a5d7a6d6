"""The learner as a source of weights: whole tensors under their Hugging Face names, one layer in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from torch import Tensor, nn

from qurl.learner.engine import gathered


def iter_all_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of every parameter of a Hugging Face model, in the dtype of forward and backward.

    A tied weight comes once, under the name of the module that owns it (embed_tokens, not lm_head), as in a checkpoint. Under
    ZeRO-3 every rank must iterate to the end, since gathering a layer takes all of them."""
    for _, layer in groupby(model.named_parameters(), key=lambda item: _layer_of(item[0])):
        named = list(layer)
        with gathered([parameter for _, parameter in named]):
            for name, parameter in named:
                yield name, parameter.detach()


def iter_share(model: nn.Module, rank: int, world_size: int) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of iter_all_weights: the shares of all ranks are disjoint, complete and of similar size."""
    loads = [0] * world_size
    owners = {}
    for name, parameter in model.named_parameters():
        owners[name] = min(range(world_size), key=loads.__getitem__)
        loads[owners[name]] += getattr(parameter, "ds_numel", parameter.numel())
    for name, tensor in iter_all_weights(model):
        if owners[name] == rank:
            yield name, tensor


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear layers, in order."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _layer_of(name: str) -> str:
    """'model.layers.3' for a parameter of that block, else the parameter itself."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match.group() if match else name
