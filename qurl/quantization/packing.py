"""Two 4-bit codes in a byte, that of the even column in the low half, as compressed-tensors and vLLM have it.

On the wire codes of 4 bits are uint8, and nothing else is: 8-bit codes are int8 or float8_e4m3fn."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def is_packed(codes: Tensor) -> bool:
    """Whether a byte holds two codes."""
    return codes.dtype == torch.uint8


def pack(codes: Tensor) -> Tensor:
    """uint8 [..., I] below 16, I even -> uint8 [..., I/2]."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """uint8 [..., I/2] -> uint8 [..., I] below 16."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def look_up(packed: Tensor, values: Tensor) -> Tensor:
    """uint8 [..., I/2] -> the entries of `values` [16] that the codes name, [..., I]; reads a byte at a time."""
    values = values.to(packed.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1)  # [256, 2]
    return functional.embedding(packed.int(), pairs).flatten(-2)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """uint8 [R, n] below 2^bits -> uint8 [R, ceil(n * bits / 8)]: value i is bits i * bits and following of its row, the low one
    first; what is left of the last byte is 0."""
    stream = ((values[..., None] >> torch.arange(bits, dtype=torch.uint8, device=values.device)) & 1).flatten(-2)
    padded = functional.pad(stream, (0, -stream.shape[1] % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=values.device)).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [R, ceil(count * bits / 8)] -> uint8 [R, count], the inverse of pack_bits."""
    stream = ((packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1).flatten(-2)
    groups = stream[:, : count * bits].unflatten(-1, (count, bits))
    return (groups << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(dim=-1, dtype=torch.uint8)
