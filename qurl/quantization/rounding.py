"""Rounding to one of two neighbors at random, such that the mean is the number itself.

Rounding to nearest hides an update smaller than half a code from the rollout policy until it has added up. Rounded at random, a
weight between two codes takes the upper one with the probability of its distance from the lower one, so decoded weights follow
the policy on average at every step. The price is twice the noise power of a copy, drawn anew for each version: about a third of
the codes differ from those before although no weight moved. Draws depend on the run's seed, the weight version and the module
alone, so a version that is sent again, or encoded by another rank, has the same codes."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

E4M3_LARGEST = torch.finfo(torch.float8_e4m3fn).max
E4M3_MANTISSA_BITS = 3
E4M3_SMALLEST_EXPONENT = -6


def rounding_generator(seed: int, version: int, module: str, device: torch.device) -> torch.Generator:
    """The draws for one weight matrix of one weight version."""
    digest = hashlib.blake2b(f"{seed}/{version}/{module}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)  # 63 bits: manual_seed takes a signed number


def to_int8(x: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """int8 codes with mean x, within +-largest; x float32 within +-largest, give or take its last bit."""
    return to_neighbors(x, generator).clamp_(-largest, largest).to(torch.int8)


def to_e4m3(x: Tensor, generator: torch.Generator) -> Tensor:
    """float8_e4m3fn codes with mean x; x float32 within +-448, give or take its last bit."""
    exponent = torch.frexp(x).exponent - 1  # floor(log2 |x|)
    shift = exponent.clamp_(min=E4M3_SMALLEST_EXPONENT) - E4M3_MANTISSA_BITS
    spacing = torch.ldexp(torch.ones_like(x), shift)  # between the neighbors of x; dividing by it is exact
    rounded = to_neighbors(x / spacing, generator).mul_(spacing)
    return rounded.clamp_(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn)


def to_neighbors(x: Tensor, generator: torch.Generator) -> Tensor:
    """floor(x), plus 1 with the probability of what is left."""
    lower = x.floor()
    draws = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return lower + (draws < x - lower)
