"""The policy as the engines compute it: the learner's own forward, with quantized arithmetic in the quantized layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qurl.sync import WeightSender


@contextmanager
def quantized_arithmetic(model: nn.Module, sender: WeightSender) -> Iterator[None]:
    """Inside the context each module that `sender` quantizes answers as an engine would (WeightSender.linear): the codes of its
    weight in the version sent last, the format's rule for activations, outputs in the dtype of the inputs.

    A layer is encoded when it runs and its codes are dropped behind it, so memory peaks at one layer and ZeRO-3 gathers as ever.
    Everything else, dtypes included, stays the learner's. Engines under tensor parallelism that divide the inputs of a layer
    find scales of activations on each rank's part; here they are found on the whole."""
    with ExitStack() as stack:
        for name in sender.targets:
            hook = partial(_answer, sender, name)
            stack.callback(model.get_submodule(name).register_forward_hook(hook, prepend=True).remove)  # before ZeRO-3 lets go
        yield


def _answer(sender: WeightSender, name: str, module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
    """In place of the full-precision output."""
    return sender.linear(name, args[0], module.weight, module.bias)


@contextmanager
def perturbed_inputs(model: Any, relative: float) -> Iterator[None]:
    """Inside the context token embeddings are multiplied by 1 + relative * z, z standard normal and the same in each call.

    Two engines that compute the same function in another order of sums differ by about that much from the first layer on. What
    quantized layers make of it says how far two correct engines are apart. Draws from no generator that training uses."""

    def perturb(module: Any, args: Any, output: Tensor) -> Tensor:
        generator = torch.Generator(output.device).manual_seed(0)
        noise = torch.randn(output.shape, generator=generator, device=output.device)
        return (output.float() * (1.0 + relative * noise)).to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(perturb)
    try:
        yield
    finally:
        hook.remove()
