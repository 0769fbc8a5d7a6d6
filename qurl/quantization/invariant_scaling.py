"""Update-aware quantization: fold a constant s into norms and the linear layers behind them.

A norm with weight g feeds linear layers W: y = W (g * n). Multiplying g by s and dividing W by s leaves y as it is, but W and its
quantization step become s times smaller while an Adam step keeps its size, so s times as many codes change per step (QuRL,
arXiv:2602.13953, eq. 11 and 12). Which layers are folded is a reconstruction from secondary sources: q, k, v behind input_layernorm
and gate, up behind post_attention_layernorm. The formats here are scale-equivariant, so codes are the same right after the fold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FOLDS = {
    "input_layernorm": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "post_attention_layernorm": ("mlp", ("gate_proj", "up_proj")),
}
"""norm -> (the block it feeds, the linear layers of the block that read the norm's output)"""

NOT_READING_THE_NORM = {"self_attn": {"o_proj", "q_norm", "k_norm"}, "mlp": {"down_proj"}}
EXACT_ENOUGH = (torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class _Fold:
    """A norm's weight [I] and the weights [O, I] behind it, by parameter name."""

    norm: tuple[str, Tensor]
    linears: list[tuple[str, Tensor]]


def fold_invariant_scaling(model: nn.Module, s: float) -> list[str]:
    """Fold s into a decoder in place, once, before training; returns the names of the changed parameters, norms first per block.

    model: a Hugging Face decoder with the blocks of Llama, Mistral, Qwen2 or Qwen3, float32, not yet wrapped or partitioned.
    Biases, q_norm, k_norm, o_proj, down_proj, final norm, embeddings and lm_head are never touched.
    Raises ValueError, and changes nothing, where s is not a positive number or the model is built otherwise: fused projections,
    experts, norms of the form (1 + weight), further layers that read a norm's output."""
    if not (math.isfinite(s) and s > 0):
        raise ValueError(f"quantization.invariant_scale={s} must be a positive number; the paper uses 1.5")
    folds = _folds(model)
    weights = [weight for fold in folds for _, weight in (fold.norm, *fold.linears)]
    if len({id(weight) for weight in weights}) != len(weights):
        raise _unsupported("layers share weights, which would be scaled more than once")
    with torch.no_grad():
        for fold in folds:
            fold.norm[1].mul_(s)
            for _, weight in fold.linears:
                weight.div_(s)
    return [name for fold in folds for name, _ in (fold.norm, *fold.linears)]


def scaled_linear_weights(model: nn.Module) -> list[str]:
    """Names of the parameters that fold_invariant_scaling divides: q, k, v, gate and up of every block.

    Adam's steps do not depend on the size of a gradient, so under it folding s amounts to a learning rate s times as large on
    exactly these (and 1/s of it on the norms before them). Raises ValueError as fold_invariant_scaling does."""
    return [name for fold in _folds(model) for name, _ in fold.linears]


def _folds(model: nn.Module) -> list[_Fold]:
    return [fold for name, layer in _decoder_layers(model) for fold in _layer_folds(name, layer)]


def _decoder_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    modules = model.named_modules()
    stacks = [(name, m) for name, m in modules if isinstance(m, nn.ModuleList) and name.rpartition(".")[2] == "layers"]
    if not any(len(stack) for _, stack in stacks):
        raise _unsupported(f"{type(model).__name__} has no list of decoder blocks named 'layers'")
    for stack_name, stack in stacks:
        for index, layer in enumerate(stack):
            yield f"{stack_name}.{index}", layer


def _layer_folds(name: str, layer: nn.Module) -> Iterator[_Fold]:
    """The two folds of one decoder block, checked."""
    expected = {*FOLDS, *(block for block, _ in FOLDS.values())}
    _check_children(name, layer, expected, optional=set())
    for norm_name, (block_name, linear_names) in FOLDS.items():
        norm, block = layer.get_submodule(norm_name), layer.get_submodule(block_name)
        _check_children(f"{name}.{block_name}", block, set(linear_names), NOT_READING_THE_NORM[block_name])
        norm_weight = _weight(f"{name}.{norm_name}", norm, ndim=1)
        if not _is_linear_in_its_weight(norm, norm_weight[1]):
            raise _unsupported(f"{name}.{norm_name} ({type(norm).__name__}) does not scale its output with its weight, "
                               "as norms of the form (1 + weight) and norms with a bias do not")
        linears = [_linear_weight(f"{name}.{block_name}.{linear}", block.get_submodule(linear)) for linear in linear_names]
        yield _Fold(norm_weight, linears)


def _check_children(name: str, module: nn.Module, required: set[str], optional: set[str]) -> None:
    found = {child for child, m in module.named_children() if next(m.parameters(), None) is not None}
    if required - found:
        raise _unsupported(f"{name} has no {sorted(required - found)}; its parts are {sorted(found)}")
    if found - required - optional:
        raise _unsupported(f"{name} has unknown parts {sorted(found - required - optional)}, which may read the scaled norm")


def _linear_weight(name: str, module: nn.Module) -> tuple[str, Tensor]:
    if not isinstance(module, nn.Linear):
        raise _unsupported(f"{name} is a {type(module).__name__}, not a plain nn.Linear")
    return _weight(name, module, ndim=2)


def _weight(name: str, module: nn.Module, ndim: int) -> tuple[str, Tensor]:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise _unsupported(f"{name} ({type(module).__name__}) has no weight")
    if weight.ndim != ndim or weight.numel() == 0:
        raise ValueError(f"{name}.weight has shape {tuple(weight.shape)}; fold before DeepSpeed partitions the weights")
    if weight.dtype not in EXACT_ENOUGH:
        raise ValueError(
            f"{name}.weight is {weight.dtype}; dividing by quantization.invariant_scale would round every weight again, so load "
            "the model in float32 before folding, or set quantization.update_awareness=none"
        )
    return f"{name}.weight", weight


def _is_linear_in_its_weight(norm: nn.Module, weight: Tensor) -> bool:
    x = torch.linspace(-1.0, 2.0, weight.numel(), dtype=weight.dtype, device=weight.device)[None]
    with torch.no_grad():
        once, twice = (torch.func.functional_call(norm, {"weight": factor * weight}, (x,)) for factor in (1.0, 2.0))
    return torch.allclose(twice, 2.0 * once, rtol=1e-4, atol=1e-6)  # far below the factor 1 + w would miss by, far above rounding


def _unsupported(found: str) -> ValueError:
    return ValueError(
        f"quantization.update_awareness=invariant_scaling knows the blocks of Llama, Mistral, Qwen2 and Qwen3, but {found}; "
        "use quantization.update_awareness=none (and learner.scaled_layers_multiplier=1, which means the same layers)"
    )
