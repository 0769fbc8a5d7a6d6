"""LO-BCQ linear layers on the CPU, with weights that stay packed: 37 bytes per 64 of them in the package's layout.

Every layout is taken. A block's book takes 4 bits in memory, but the bits that it has on the wire where blocks of 2 or 4 inputs
have at most 4 books: those are looked up in another way, whose time grows with the number of books. `tiles.h` says how weights lie
in memory, `portable.h` which sums are exact and in what order the others are taken, so that every set of instructions gives the
same bits and a token's result does not depend on its neighbors. With `quantize_activations` of the format the activations'
codewords agree bit for bit; results differ from its `linear` by the rounding of float32 sums. W4A16 has no codewords: its
activations become whole numbers of 23 bits with a scale for each array, which loses less than 2^-22 of the array's largest number,
so that its products are sums of integers as well. A rotation of the format turns a token's float32 numbers before either, with the
bits of `rotate`.

Sets of instructions: AVX-512 with VBMI and VNNI, AVX2, and portable C++ for all others. Tests run the AVX-512 loops by an emulation
where the processor has no such instructions; speed not measured: AVX-512.

A token with NaN or Inf gives NaN everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import Structure, addressof, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qurl.quantization.kernels.cpu.library import Library, load
from qurl.quantization.lobcq import Codebooks, LoBcq
from qurl.quantization.packing import pack_bits, unpack_bits

_SELECTOR_BITS = 4
_DTYPES = (torch.bfloat16, torch.float32)


class _Layout(Structure):
    """See Layout in tiles.h."""

    _fields_ = [("array", c_int), ("block", c_int), ("selector_bits", c_int)]


class LoBcqKernel:
    """The functions for one format."""

    def __init__(self, format: LoBcq, library: Library) -> None:
        self._library = _typed(library)  # which owns what `_how` points to
        self._functions = library.functions
        self._keeps_activations = format.keeps_activations
        self._layout = _Layout(format.layout.array, format.layout.block, format.layout.selector_bits)
        self._address = addressof(self._layout)
        self._weight_books = self._books(format.codebooks.weights)
        self._activation_books = self._books(format.codebooks.activations)
        self._how = (library.path_number, library.openmp, format.rotation)  # arguments of what computes

    def pack(self, wire: Mapping[str, Tensor]) -> Tensor:
        """uint8 [bytes] from wire tensors with one row per output feature, the global scale too: its matrices may be several."""
        codes = wire["weight"].contiguous()
        selectors = self._wide_selectors(wire, len(codes), 2 * codes.shape[1] // self._layout.block)
        scales = wire["weight_scale"].contiguous()
        global_scales = wire["weight_global_scale"].float().contiguous()
        rows, columns = len(codes), 2 * codes.shape[1]
        packed = torch.empty(self._functions.qurl_lobcq_bytes(self._address, rows, columns), dtype=torch.uint8)
        self._functions.qurl_lobcq_pack(
            self._address, rows, columns, packed.data_ptr(), codes.data_ptr(), selectors.data_ptr(), scales.data_ptr(),
            global_scales.data_ptr(),
        )  # fmt: skip
        return packed

    def unpack(self, packed: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
        """What `pack` was given."""
        codes = torch.empty((rows, columns // 2), dtype=torch.uint8)
        blocks = columns // self._layout.block
        selectors = torch.empty((rows, blocks // 2), dtype=torch.uint8)
        scales = torch.empty((rows, columns // self._layout.array), dtype=torch.float8_e4m3fn)
        global_scales = torch.empty((rows, 1), dtype=torch.float32)
        self._functions.qurl_lobcq_unpack(
            self._address, rows, columns, packed.data_ptr(), codes.data_ptr(), selectors.data_ptr(), scales.data_ptr(),
            global_scales.data_ptr(),
        )  # fmt: skip
        wire = {"weight": codes}
        if self._layout.selector_bits:
            wire["weight_selector"] = _repacked(selectors, _SELECTOR_BITS, self._layout.selector_bits, blocks)
        return {**wire, "weight_scale": scales, "weight_global_scale": global_scales}

    def quantize_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As the format's for W4A4: codewords, here int8 [T, I], and float32 scales [T, I/L_A]; x: bfloat16 or float32 [T, I]."""
        x = x.contiguous()
        codes = torch.empty(x.shape, dtype=torch.int8)
        scales = torch.empty((x.shape[0], x.shape[1] // self._layout.array), dtype=torch.float32)
        factors = torch.empty((x.shape[0], 1), dtype=torch.float64)
        if len(x):
            self._functions.qurl_lobcq_encode(
                self._address, self._activation_books, *self._how, x.data_ptr(), x.dtype == torch.bfloat16, *x.shape,
                codes.data_ptr(), scales.data_ptr(), factors.data_ptr(),
            )  # fmt: skip
        return codes, (scales / 256.0) / factors.reciprocal().float()

    def linear(self, x: Tensor, packed: Tensor, rows: int, bias: Tensor | None) -> Tensor:
        """x [T, I] -> [T, rows] in x's dtype; bfloat16 and float32 are computed with as they are, others in float32."""
        if x.dtype not in _DTYPES:
            return self.linear(x.float(), packed, rows, bias).to(x.dtype)
        if bias is not None and bias.dtype not in _DTYPES:
            bias = bias.float()
        x = x.contiguous()
        out = x.new_empty((x.shape[0], rows))
        if out.numel():
            self._functions.qurl_lobcq_linear(
                self._address, self._weight_books, self._activation_books, *self._how, self._keeps_activations, x.data_ptr(),
                x.dtype == torch.bfloat16, x.shape[0], packed.data_ptr(), rows, x.shape[1],
                None if bias is None else bias.data_ptr(), bias is not None and bias.dtype == torch.bfloat16, out.data_ptr(),
            )  # fmt: skip
        return out

    def _wide_selectors(self, wire: Mapping[str, Tensor], rows: int, blocks: int) -> Tensor:
        """uint8 [rows, blocks / 2]"""
        if not self._layout.selector_bits:
            return torch.zeros((rows, blocks // 2), dtype=torch.uint8)
        return _repacked(wire["weight_selector"], self._layout.selector_bits, _SELECTOR_BITS, blocks)

    def _books(self, codebooks: Codebooks) -> int:
        books = list(codebooks.entries)
        books += books[-1:] * (2**_SELECTOR_BITS - len(books))  # the first of equals is chosen, so copies never are
        entries = torch.tensor(books, dtype=torch.int8)
        return self._functions.qurl_lobcq_books(entries.data_ptr(), codebooks.layout.largest)


def _repacked(selectors: Tensor, bits: int, wanted: int, count: int) -> Tensor:
    """`count` a row, of so many bits each."""
    return selectors.contiguous() if bits == wanted else pack_bits(unpack_bits(selectors, bits, count), wanted)


@cache
def kernel_of(format: LoBcq) -> LoBcqKernel:
    """One per format and process. Raises KernelsUnavailable."""
    return LoBcqKernel(format, load())


def _typed(library: Library) -> Library:
    """Tell ctypes what the functions take."""
    functions = library.functions
    how: list[Any] = [c_int, c_void_p, c_int]
    functions.qurl_lobcq_books.argtypes = [c_void_p, c_int]
    functions.qurl_lobcq_books.restype = c_void_p
    functions.qurl_lobcq_bytes.argtypes = [c_void_p, c_int64, c_int64]
    functions.qurl_lobcq_bytes.restype = c_int64
    functions.qurl_lobcq_pack.argtypes = functions.qurl_lobcq_unpack.argtypes = [c_void_p, c_int64, c_int64, *[c_void_p] * 5]
    functions.qurl_lobcq_encode.argtypes = [c_void_p, c_void_p, *how, c_void_p, c_int, c_int64, c_int64, *[c_void_p] * 3]
    functions.qurl_lobcq_linear.argtypes = [
        c_void_p, c_void_p, c_void_p, *how, c_int, c_void_p, c_int, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_int,
        c_void_p,
    ]  # fmt: skip
    for name in ("pack", "unpack", "encode", "linear"):
        getattr(functions, f"qurl_lobcq_{name}").restype = None
    return library
