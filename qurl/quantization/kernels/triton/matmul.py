"""Packed LO-BCQ weights times activations: a float32 sum, over arrays, of scales times a sum of products of codewords.

    W4A4   x is codewords in int8, sums are exact in int32; scales of weight and activations multiply them.
    W4A16  x is bfloat16, float16 or float32, which hold codewords exactly; the array's scale multiplies a float32 sum.

A tile is rows of the weight by tokens, for decoding few tokens as for prefill. Where a weight has too few rows to occupy a GPU, its
columns are split; how, depends on its shape alone. For few tokens programs share the splits and a second kernel adds them up; for
many tokens one program goes through all of them, and adds up in the same order. So in W4A4, where sums inside an array are exact
and scales are multiplied and added apart (no fused multiply-add), the bits of a token's result do not depend on how many tokens
there are, and are the same on every device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qurl.quantization.kernels.triton.codewords import gathered_codewords, permuted_codewords, selected_books

WORDS = {2: torch.uint8, 4: torch.int16, 8: torch.int32}
"""By L_b, the word that a block's codes are."""

SMALLEST_ARRAY = 32
"""What tensor cores multiply in int8 has at least so many columns."""

ROWS = 128
"""Of a tile."""

SHARED_TOKENS = 64
"""Up to so many tokens the splits of a weight are programs of their own."""


@triton.jit
def _summed(
    x, x_scales, weight, selectors, scales, codebooks, selector_bytes, first, last,
    BLOCK: tl.constexpr, ARRAY: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, PERMUTE: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, TOKENS] over arrays from first to last. Pointers: weight and selectors [ROWS, .], x [., TOKENS]."""
    BLOCKS: tl.constexpr = ARRAY // BLOCK
    block = tl.arange(0, BLOCKS)[None, :]
    column = tl.arange(0, ARRAY)[:, None]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for array in range(first, last):
        words = tl.load(weight + (array * BLOCKS + block))
        if BITS == 0:
            books = tl.zeros([ROWS, BLOCKS], tl.int32)
        else:
            books = selected_books(selectors, array * BLOCKS + block, selector_bytes, BITS)
        if PERMUTE:
            codewords = permuted_codewords(words, books, codebooks, ROWS, BLOCKS)
        else:
            codewords = gathered_codewords(words, books, codebooks, ROWS, BLOCKS, BLOCK)
        numbers = tl.load(x + (array * ARRAY + column))
        sums = tl.dot(codewords.to(numbers.dtype), numbers, input_precision="ieee").to(tl.float32)
        # E4M3 shifted into float16's exponent is 2^-8 of itself, subnormal numbers too; no GPU instruction for E4M3 is needed
        scale = (tl.load(scales + array).to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32)[:, None] * 256.0
        if x_scales is not None:
            scale = scale * tl.load(x_scales + array)[None, :]
        total += sums * scale
    return total


@triton.jit
def _store(out, total, global_scale, bias, row, token, rows, tokens):
    """total / the row's global scale + bias, in out's dtype."""
    is_row = row < rows
    total = tl.div_rn(total, tl.load(global_scale + row, mask=is_row, other=1.0)[:, None] + tl.zeros_like(total))
    if bias is not None:
        total += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    place = out + (token.to(tl.int64)[None, :] * rows + row[:, None])
    tl.store(place, total.to(out.dtype.element_ty), mask=is_row[:, None] & (token < tokens)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def multiply_kernel(
    out, x, x_scales, weight, selectors, scales, global_scale, codebooks, bias,
    tokens, rows, arrays, selector_bytes, splits, arrays_per_split,
    BLOCK: tl.constexpr, ARRAY: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, SHARED: tl.constexpr,
    PERMUTE: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of tokens, tiles of rows, and the splits where these are SHARED; then out is float32 [splits, T, O], yet without
    global scales and bias, else [T, O]. weight: words [O, I / BLOCK]; scales: uint8, the bits of E4M3. Rows and tokens beyond
    the last read what the last one reads."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    own_token = tl.minimum(token, tokens - 1).to(tl.int64)
    own_row = tl.minimum(row, rows - 1).to(tl.int64)
    x += own_token[None, :] * (arrays * ARRAY)
    weight += own_row[:, None] * (arrays * (ARRAY // BLOCK))
    scales += own_row * arrays
    if BITS != 0:
        selectors += own_row[:, None] * selector_bytes
    if x_scales is not None:
        x_scales += own_token * arrays
    if SHARED:
        first = tl.program_id(2) * arrays_per_split
        total = _summed(
            x, x_scales, weight, selectors, scales, codebooks, selector_bytes, first, tl.minimum(first + arrays_per_split, arrays),
            BLOCK, ARRAY, BITS, ROWS, TOKENS, PERMUTE,
        )  # fmt: skip
        place = out + ((tl.program_id(2).to(tl.int64) * tokens + token[None, :]) * rows + row[:, None])
        tl.store(place, total, mask=(row < rows)[:, None] & (token < tokens)[None, :])
    else:
        total = tl.zeros([ROWS, TOKENS], tl.float32)
        for split in range(splits):
            first = split * arrays_per_split
            total += _summed(
                x, x_scales, weight, selectors, scales, codebooks, selector_bytes, first,
                tl.minimum(first + arrays_per_split, arrays), BLOCK, ARRAY, BITS, ROWS, TOKENS, PERMUTE,
            )  # fmt: skip
        _store(out, total, global_scale, bias, row, token, rows, tokens)


@triton.jit(do_not_specialize=["tokens"])
def add_splits_kernel(out, parts, global_scale, bias, tokens, rows, splits, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """Grid: tiles of tokens and of rows. out [T, O] from parts float32 [splits, T, O]."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    mask = (row < rows)[:, None] & (token < tokens)[None, :]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for split in range(splits):
        place = parts + ((tl.full([], split, tl.int64) * tokens + token[None, :]) * rows + row[:, None])
        total += tl.load(place, mask=mask, other=0.0)
    _store(out, total, global_scale, bias, row, token, rows, tokens)


def num_splits(rows: int, arrays: int) -> int:
    """Into how many parts the columns of a weight are cut: until there are 256 tiles, or fewer than 16 arrays in a part."""
    splits = 1
    while triton.cdiv(rows, ROWS) * splits < 256 and arrays >= 16 * splits:
        splits *= 2
    return splits


@torch.library.custom_op("qurl::lobcq_matmul", mutates_args=())
def lobcq_matmul(
    x: Tensor, x_scales: Tensor | None, weight: Tensor, selectors: Tensor | None, scales: Tensor, global_scale: Tensor,
    codebooks: Tensor, bias: Tensor | None, block: int, permute: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """[T, O] in dtype. x [T, I]: codewords in int8 with x_scales float32 [T, I / L_A] (W4A4), or floating with None (W4A16).

    weight uint8 [O, I/2], selectors uint8 [O, .] (None: one book), scales float8_e4m3fn [O, I / L_A], as on the wire;
    global_scale float32 [O, 1]: its matrix's for each row; codebooks: see `codebook_bytes`; block: L_b.
    permute: look codes up by byte permutes, which takes blocks of 8 and an NVIDIA GPU. L_A is 32 or more."""
    (tokens, columns), (rows, arrays), num_books = x.shape, scales.shape, len(codebooks)
    array, bits = columns // arrays, num_books.bit_length() - 1
    assert array >= SMALLEST_ARRAY and (x_scales is not None) == (x.dtype == torch.int8) and (block == 8 or not permute)
    out = x.new_empty((tokens, rows), dtype=dtype)
    splits = num_splits(rows, arrays)
    is_shared = splits > 1 and tokens <= SHARED_TOKENS
    parts = x.new_empty((splits, tokens, rows), dtype=torch.float32) if is_shared else out
    width, num_warps = (16, 4) if tokens <= 16 else (64, 8)
    grid = (triton.cdiv(tokens, width), triton.cdiv(rows, ROWS), splits if is_shared else 1)
    multiply_kernel[grid](
        parts, x.contiguous(), x_scales, weight.view(WORDS[block]), selectors, scales.view(torch.uint8), global_scale,
        codebooks.view(torch.int32) if permute else codebooks, bias,
        tokens, rows, arrays, 0 if selectors is None else selectors.shape[1], splits, triton.cdiv(arrays, splits),
        BLOCK=block, ARRAY=array, BITS=bits, ROWS=ROWS, TOKENS=width, SHARED=is_shared, PERMUTE=permute,
        num_warps=num_warps, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip
    if is_shared:
        add_splits_kernel[(triton.cdiv(tokens, 4), triton.cdiv(rows, 256))](
            out, parts, global_scale, bias, tokens, rows, splits, ROWS=256, TOKENS=4, enable_fp_fusion=False
        )
    return out


@lobcq_matmul.register_fake
def _(
    x: Tensor, x_scales: Tensor | None, weight: Tensor, selectors: Tensor | None, scales: Tensor, global_scale: Tensor,
    codebooks: Tensor, bias: Tensor | None, block: int, permute: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)
