"""The rotation of activations on a GPU, the bits of qurl.quantization.hadamard.rotate: a program rotates a chunk of a token.

Partners of a stage are brought into the last axis, split, added and subtracted, and joined where they were."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024
"""Columns of a program; a multiple of every block."""


@triton.jit
def rotate_kernel(x, out, columns, factor, STAGES: tl.constexpr, CHUNK: tl.constexpr):
    """Grid: tokens, chunks of a token. x, out: [T, I]."""
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    place = tl.program_id(0).to(tl.int64) * columns + column
    values = tl.load(x + place, mask=column < columns, other=0.0).to(tl.float32)
    for stage in tl.static_range(STAGES):
        partners = tl.permute(tl.reshape(values, [CHUNK >> (stage + 1), 2, 1 << stage]), [0, 2, 1])
        first, second = tl.split(partners)
        values = tl.reshape(tl.permute(tl.join(first + second, first - second), [0, 2, 1]), [CHUNK])
    tl.store(out + place, (values * factor).to(out.dtype.element_ty), mask=column < columns)


@torch.library.custom_op("qurl::rotate", mutates_args=())
def rotated(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """`rotate` of activations [T, I] of any floating dtype, rounded to `dtype`; I a multiple of size."""
    tokens, columns = x.shape
    assert columns % size == 0
    out = x.new_empty((tokens, columns), dtype=dtype)
    rotate_kernel[(tokens, triton.cdiv(columns, CHUNK))](
        x.contiguous(), out, columns, size**-0.5, STAGES=size.bit_length() - 1, CHUNK=CHUNK, enable_fp_fusion=False
    )
    return out


@rotated.register_fake
def _(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)
