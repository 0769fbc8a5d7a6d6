"""INT8 codes with fewer blocks, as lookups.

What becomes of a code depends on nothing but the code itself and the lowest block that is kept, so a table of 256 entries for each
lowest block holds all of it. A product of operands with blocks left out is an ordinary INT8 product of what the tables give:

    sum over kept i, j of 2^(K(i+j)) A_i W_j^T  =  A~ W~^T,   A~ = sum over kept i of 2^(Ki) A_i,  W~ likewise

for every choice that is made for each operand by itself. Only the set without LL is none of these; it takes a second product,
A W^T - A_L W_L^T, of the lower blocks.

INT8 has no 128: where codes are rounded to multiples of 16, those from 120 on become 112, and it is outliers that have such codes.
With three blocks of 2 bits, 126 and 127 become 124."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from qurl.quantization.axbxp.precision import Digits, Kept, Precision, num_blocks
from qurl.quantization.kernels.cpu.lookup import LookupKernel, lookup_kernel

LARGEST_CODE = 127
CHUNK = 1 << 17
"""Codes that torch looks up at once on a CPU, so that the numbers of entries, four bytes a code, stay in its cache."""


@dataclass(frozen=True, slots=True)
class BlockTable:
    """What is kept of every code. A code is its byte here: -1 is 255."""

    values: Tensor  # int8 [number of lowest blocks, 256]: by lowest block, then by code
    lowest: Tensor  # int8 [256]: the lowest block that a code would choose by itself
    group: int  # inputs that share the highest of their lowest blocks; 1: `values` has one row, which says everything
    is_identity: bool  # all codes stay as they are


def weight_table(precision: Precision) -> BlockTable:
    """Of the weights' codes."""
    return _table(precision.block_bits, precision.weight, precision.digits)


def activation_table(precision: Precision) -> BlockTable:
    """Of the activations' codes."""
    return _table(precision.block_bits, precision.activation, precision.digits)


def keep(codes: Tensor, table: BlockTable) -> Tensor:
    """int8 codes [..., I] without the blocks that are dropped; groups count from the first input, the last may be shorter."""
    if table.is_identity:
        return codes
    parts = _on(table, codes.device)
    if kernel := _compiled(codes):
        return kernel.look_up(codes, *parts)
    if codes.dim() != 2 or codes.device.type != "cpu":
        return _look_up_in_torch(codes, *parts)
    kept = torch.empty_like(codes, memory_format=torch.contiguous_format)
    rows = max(1, CHUNK // codes.shape[1])
    for some, result in zip(codes.split(rows), kept.split(rows), strict=True):
        result.copy_(_look_up_in_torch(some, *parts))
    return kept


def look_up(codes: Tensor, values: Tensor, lowest: Tensor, group: int) -> Tensor:
    """keep with the parts of a table, on the device of codes."""
    kernel = _compiled(codes)
    return kernel.look_up(codes, values, lowest, group) if kernel else _look_up_in_torch(codes, values, lowest, group)


def _compiled(codes: Tensor) -> LookupKernel | None:
    """Gives what torch gives, faster. A compiler that traces gets operators that it knows."""
    return None if codes.device.type != "cpu" or torch.compiler.is_compiling() else lookup_kernel()


def _look_up_in_torch(codes: Tensor, values: Tensor, lowest: Tensor, group: int) -> Tensor:
    index = codes.contiguous().view(torch.uint8).int()
    if group > 1:
        shared = _group_lowest(index, lowest, group).int().repeat_interleave(group, dim=-1)
        index += 256 * shared[..., : codes.shape[-1]]
    return values.flatten().index_select(0, index.flatten()).view(codes.shape)


def lower_parts(codes: Tensor, digits: Digits) -> Tensor:
    """The lower blocks of 4 bits, signs included: int8 [..., I] such that codes - lower_parts is a multiple of 16."""
    return look_up(codes, *_on(lower_table(digits), codes.device))


def group_lowest(codes: Tensor, table: BlockTable) -> Tensor:
    """The lowest block of each group; int8 [..., ceil(I/group)]."""
    _, lowest, group = _on(table, codes.device)
    return _group_lowest(codes.contiguous().view(torch.uint8).int(), lowest, group)


def _group_lowest(index: Tensor, lowest: Tensor, group: int) -> Tensor:
    own = lowest.index_select(0, index.flatten()).view(index.shape)
    return functional.pad(own, (0, -index.shape[-1] % group)).unflatten(-1, (-1, group)).amax(dim=-1)


@cache
def _table(block_bits: int, kept: Kept, digits: Digits) -> BlockTable:
    count = num_blocks(block_bits)
    choices = range(count - kept.blocks + 1)  # of the lowest block
    codes = _codes().tolist()
    lowest = [max(leading_block(code, block_bits, digits) - kept.blocks + 1, 0) for code in codes]
    if kept.group is None:
        rows = [[_kept_value(code, choices[-1], block_bits, digits) for code in codes]]
    elif kept.group == 1:
        rows = [[_kept_value(code, low, block_bits, digits) for code, low in zip(codes, lowest, strict=True)]]
    else:
        window = 2 ** (block_bits * kept.blocks) - 1  # the largest number of L blocks: a group has nowhere to round up to
        limits = [window << (block_bits * low) if digits is Digits.rounded else LARGEST_CODE for low in choices]
        rows = [
            [max(-limits[low], min(limits[low], _kept_value(code, low, block_bits, digits))) for code in codes] for low in choices
        ]
    values = torch.tensor(rows, dtype=torch.int8)
    return BlockTable(values, torch.tensor(lowest, dtype=torch.int8), kept.group or 1, rows == [codes])


@cache
def lower_table(digits: Digits) -> BlockTable:
    """Of lower_parts. Upper blocks are not cut off at 127: where it is rounded, 127 is 128 - 1."""
    rows = [[code - _upper(code, 4, 4, digits) for code in _codes().tolist()]]
    return BlockTable(torch.tensor(rows, dtype=torch.int8), torch.zeros(256, dtype=torch.int8), 1, False)


def leading_block(code: int, block_bits: int, digits: Digits) -> int:
    """The uppermost block that is not 0; 0 where there is none."""
    for block in range(num_blocks(block_bits) - 1, 0, -1):
        is_balanced = digits is Digits.balanced
        if code - digit_sum(code, block, block_bits) if is_balanced else abs(code) >> (block_bits * block):
            return block
    return 0


def digit_sum(code: int, num_digits: int, block_bits: int) -> int:
    """What the lowest balanced digits of a code come to."""
    total, half = 0, 2 ** (block_bits - 1)
    for digit in range(num_digits):
        shift = block_bits * digit
        rest = (code - total) >> shift
        total += ((rest + half) % (2 * half) - half) << shift
    return total


def _kept_value(code: int, lowest: int, block_bits: int, digits: Digits) -> int:
    """The code from its block `lowest` on, within what INT8 holds."""
    shift = block_bits * lowest
    limit = LARGEST_CODE >> shift << shift
    return max(-limit, min(limit, _upper(code, shift, block_bits, digits)))


def _upper(code: int, shift: int, block_bits: int, digits: Digits) -> int:
    if digits is Digits.balanced:
        return code - digit_sum(code, shift // block_bits, block_bits)
    magnitude = abs(code)
    upper = magnitude >> shift if digits is Digits.truncated else round(magnitude / 2**shift)
    return (upper << shift) * (1 if code >= 0 else -1)


def _codes() -> Tensor:
    """By byte; -128, which is no code, counts as -127."""
    return torch.arange(256, dtype=torch.uint8).view(torch.int8).clamp(min=-LARGEST_CODE)


def _on(table: BlockTable, device: torch.device) -> tuple[Tensor, Tensor, int]:
    return table.values.to(device), table.lowest.to(device), table.group
