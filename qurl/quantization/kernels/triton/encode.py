"""Activations of LO-BCQ on a GPU: codewords and scales of every token in one kernel, the bits of LoBcq.quantize_activations.

A program encodes a chunk of a token's arrays. Its token's largest magnitude it finds by reading the whole token, as its neighbors
do: a few thousand numbers that lie in the L2 cache, in exchange for one launch and no order between programs. The search is the
reference's: for each of a block's numbers, by its half step, a row with every book's nearest codeword; N_c sums of squared errors
in the order of the numbers; the first of the smallest.

Equal bits need what a GPU compiler does not do by itself: quotients rounded as IEEE says (div_rn), products and sums rounded apart
(no fused multiply-add), largest magnitudes in which NaN wins (compared as integers). E4M3 is rounded by hand: GPUs before compute
capability 8.9 have no instruction for it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024
"""Columns that a program encodes."""


@triton.jit
def _magnitude_bits(x):
    """|x| as an integer, which orders magnitudes, with NaN above all."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _to_e4m3(x):
    """The E4M3 number nearest to x, ties to even; float32 from 0 to 448, or NaN."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    subnormal = (x + 16384.0) - 16384.0  # float32 numbers from 2^14 are 2^-9 apart
    return tl.where(x >= 0.015625, normal, subnormal)


@triton.jit
def _in_codewords(x, inverse):
    """x over its scale; float32, and 0 for what is no number, whose token has scales that are none."""
    number = x.to(tl.float32) * inverse
    return tl.where(number == number, number, 0.0)


@triton.jit
def _half_step(number, LARGEST: tl.constexpr):
    """Row of the table of nearest codewords."""
    return tl.floor(2.0 * tl.minimum(tl.maximum(number, -LARGEST), LARGEST)).to(tl.int32) + 2 * LARGEST


@triton.jit
def encode_kernel(
    x, codewords, scales, nearest, columns,
    BLOCK: tl.constexpr, ARRAY: tl.constexpr, BOOKS: tl.constexpr, LARGEST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, chunks of a token. x [T, I]; codewords int8 [T, I]; scales float32 [T, I / ARRAY]; nearest int8 [., BOOKS]."""
    BLOCKS: tl.constexpr = ARRAY // BLOCK  # of an array
    ARRAYS: tl.constexpr = CHUNK // ARRAY
    token = tl.program_id(0).to(tl.int64)
    x += token * columns
    codewords += token * columns
    scales += token * (columns // ARRAY)

    span = tl.arange(0, CHUNK)
    bits = tl.zeros([CHUNK], tl.int32)
    for start in range(0, columns, CHUNK):
        bits = tl.maximum(bits, _magnitude_bits(tl.load(x + start + span, mask=start + span < columns, other=0.0)))
    amax = tl.max(bits, axis=0).to(tl.float32, bitcast=True)
    global_scale = tl.div_rn(448.0 * LARGEST, amax)
    global_scale = tl.where(global_scale > 1.2676506002282294e30, 1.2676506002282294e30, global_scale)  # 2^100

    array = tl.program_id(1) * ARRAYS + tl.arange(0, ARRAYS)
    is_array = array < columns // ARRAY
    block = array[:, None] * ARRAY + tl.arange(0, BLOCKS)[None, :] * BLOCK  # the first column of each
    column = block[:, :, None] + tl.arange(0, BLOCK)[None, None, :]
    numbers = tl.load(x + column, mask=is_array[:, None, None], other=0.0)
    amax = tl.max(tl.max(_magnitude_bits(numbers), axis=2), axis=1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.full([ARRAYS], LARGEST, tl.float32)) * global_scale
    scale = _to_e4m3(tl.where(scale > 448.0, 448.0, scale))
    tl.store(scales + array, tl.div_rn(scale, global_scale), mask=is_array)
    inverse = tl.where(scale > 0.0, tl.div_rn(global_scale, scale), 0.0)

    books = tl.arange(0, BOOKS)[None, None, :]
    errors = tl.zeros([ARRAYS, BLOCKS, BOOKS], tl.float32)
    for position in tl.static_range(BLOCK):
        number = _in_codewords(tl.load(x + block + position, mask=is_array[:, None], other=0.0), inverse[:, None])
        candidate = tl.load(nearest + _half_step(number, LARGEST)[:, :, None] * BOOKS + books).to(tl.float32)
        error = candidate - number[:, :, None]
        errors += error * error
    book = tl.argmin(errors, axis=2, tie_break_left=True)

    step = _half_step(_in_codewords(numbers, inverse[:, None, None]), LARGEST)
    tl.store(codewords + column, tl.load(nearest + step * BOOKS + book[:, :, None]), mask=is_array[:, None, None])


@torch.library.custom_op("qurl::lobcq_encode", mutates_args=())
def lobcq_encode(x: Tensor, nearest: Tensor, block: int, array: int) -> tuple[Tensor, Tensor]:
    """Codewords int8 [T, I] and scales float32 [T, I / array] of activations [T, I] of any floating dtype, I a multiple of array.

    nearest: int8 [4 largest + 1, N_c], see `nearest_codewords`. block, array: L_b and L_A. NaN or Inf in a token makes all of its
    scales NaN."""
    tokens, columns = x.shape
    assert columns % array == 0 and nearest.is_contiguous()
    codewords = x.new_empty((tokens, columns), dtype=torch.int8)
    scales = x.new_empty((tokens, columns // array), dtype=torch.float32)
    encode_kernel[(tokens, triton.cdiv(columns, CHUNK))](
        x.contiguous(), codewords, scales, nearest, columns,
        BLOCK=block, ARRAY=array, BOOKS=nearest.shape[1], LARGEST=(len(nearest) - 1) // 4, CHUNK=CHUNK, enable_fp_fusion=False,
    )  # fmt: skip
    return codewords, scales


@lobcq_encode.register_fake
def _(x: Tensor, nearest: Tensor, block: int, array: int) -> tuple[Tensor, Tensor]:
    tokens, columns = x.shape
    return x.new_empty((tokens, columns), dtype=torch.int8), x.new_empty((tokens, columns // array), dtype=torch.float32)
