"""From packed codes to codewords: tables for the device, and two ways to look codes up.

A block of L_b codes is one word of 4 L_b bits, low bits first, as it lies on the wire; a book is 16 bytes.

Gathering loads a byte per code from a table of N_c books. Permuting keeps a book in four registers and lets the byte permute of
NVIDIA's GPUs look four codes up at a time: prmt picks any four of the eight bytes of two registers by selectors of three bits, so
with three bits of each code it picks from the lower and from the upper half of the book, and a third prmt takes, of these two,
what the fourth bit says:

    low  = prmt(book[0:4], book[4:8], codes & 0x7777)
    high = prmt(book[8:12], book[12:16], codes & 0x7777)
    found = prmt(low, high, 0x3210 | (codes >> 1) & 0x4444)"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qurl.quantization.lobcq.codebooks import Codebooks
from qurl.quantization.lobcq.layout import NUM_ENTRIES

PERMUTE = tl.constexpr("""{
.reg .b32 place, half, low, high;
and.b32 place, $2, 0x77777777;
shr.b32 half, $2, 1;
and.b32 half, half, 0x44444444;
or.b32 half, half, 0x32103210;
prmt.b32 low, $3, $4, place;
prmt.b32 high, $5, $6, place;
prmt.b32 $0, low, high, half;
shr.b32 place, place, 16;
shr.b32 half, half, 16;
prmt.b32 low, $3, $4, place;
prmt.b32 high, $5, $6, place;
prmt.b32 $1, low, high, half;
}""")
"""PTX: $0 and $1 are the codewords of the four low and the four high codes of $2; $3 to $6 is the book."""


def codebook_bytes(codebooks: Codebooks) -> Tensor:
    """int8 [N_c, 16]."""
    return codebooks.table.view(-1, NUM_ENTRIES).to(torch.int8)


def nearest_codewords(codebooks: Codebooks) -> Tensor:
    """int8 [4 largest + 1, N_c]: each book's codeword nearest to the numbers from s/2 to (s + 1)/2, where s starts at -2 largest.

    Middles between whole numbers are multiples of 1/2, so the number in between has the nearest entry of all."""
    largest = codebooks.layout.largest
    between = torch.arange(4 * largest + 1) / 2.0 - largest + 0.25
    books = codebooks.table.view(-1, NUM_ENTRIES)
    places = (between[:, None, None] - books).abs().argmin(dim=-1)  # [steps, N_c]
    return books.gather(1, places.T).T.to(torch.int8).contiguous()


@triton.jit
def selected_books(selectors, block, row_bytes, BITS: tl.constexpr):
    """The book of each block; int32. selectors: uint8 pointers to the rows; block: numbers of blocks in the row."""
    bit = block * BITS
    byte = bit >> 3
    value = tl.load(selectors + byte).to(tl.int32)
    if 8 % BITS != 0:  # a selector may begin in one byte and end in the next
        value |= tl.load(selectors + byte + 1, mask=byte + 1 < row_bytes, other=0).to(tl.int32) << 8
    return (value >> (bit & 7)) & ((1 << BITS) - 1)


@triton.jit
def gathered_codewords(words, books, codebooks, ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """int8 [ROWS, BLOCKS * BLOCK]. words, books: [ROWS, BLOCKS]; codebooks: int8 pointer."""
    shift = 4 * tl.arange(0, BLOCK)
    codes = (words.to(tl.int32)[:, :, None] >> shift[None, None, :]) & 15
    return tl.reshape(tl.load(codebooks + (books[:, :, None] * 16 + codes)), [ROWS, BLOCKS * BLOCK])


@triton.jit
def permuted_codewords(words, books, codebooks, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """The same for blocks of 8 on NVIDIA's GPUs. codebooks: int32 pointer, four numbers a book."""
    quarter = tl.arange(0, 4)
    book = tl.load(codebooks + (books[:, :, None] * 4 + quarter[None, None, :]))  # 16 bytes at once
    even, odd = tl.split(tl.reshape(book, [ROWS, BLOCKS, 2, 2]))
    book0, book2 = tl.split(even)
    book1, book3 = tl.split(odd)
    first, second = tl.inline_asm_elementwise(
        PERMUTE, "=&r,=&r,r,r,r,r,r", [words, book0, book1, book2, book3], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )
    four = tl.join(first, second)
    # joined in pairs, the bytes of a word stay in one thread's registers, where they lie already
    even_bytes = tl.join(four.to(tl.int8), (four >> 16).to(tl.int8))
    odd_bytes = tl.join((four >> 8).to(tl.int8), (four >> 24).to(tl.int8))
    return tl.reshape(tl.join(even_bytes, odd_bytes), [ROWS, BLOCKS * 8])
