"""INT8 linear layers on the CPU, with weights of 8 bits or, of Ax-BxP, the kept blocks alone.

`int8_tiles.h` says how weights lie in memory, `int8_portable.h` what is computed: exact sums of integers, then float32, in the
order of Int8.linear, so that results are its bits. Kept blocks give what the codes give that they expand to. A token with NaN or
Inf gives NaN everywhere.

Sets of instructions: AVX-512 with VBMI and VNNI, AVX2, and portable C++."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import Structure, addressof, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qurl.quantization.axbxp import PackedAxBxP
from qurl.quantization.base import QuantizationFormat
from qurl.quantization.kernels.cpu.library import Library, load
from qurl.quantization.packing import is_packed

MOST_COLUMNS = 2**17 - 1
"""Whose products of two codes of -128 a sum of 32 bits holds."""

_GROUP = 16
_DTYPES = (torch.bfloat16, torch.float32)


class _Layout(Structure):
    """See Layout in int8_tiles.h."""

    _fields_ = [("magnitude_bits", c_int), ("lowest_bits", c_int), ("block_bits", c_int)]


def has_kernel(format: QuantizationFormat) -> bool:
    """Whether the loops are written for weights of this format; whether they can run here is another question, see library.load."""
    return format.name == "int8" or isinstance(format, PackedAxBxP) and format.group == _GROUP


class Int8Kernel:
    """The functions for weights of one format."""

    def __init__(self, format: QuantizationFormat, library: Library) -> None:
        assert has_kernel(format)
        self._library = _typed(library)  # which owns what `_openmp` points to
        self._functions = library.functions
        self._format = format
        if isinstance(format, PackedAxBxP):
            self._layout = _Layout(format.magnitude_bits, format.index_bits, format.precision.block_bits)
        else:
            self._layout = _Layout(8, 0, 0)
        self._address = addressof(self._layout)
        self._openmp = library.openmp

    def pack(self, wire: Mapping[str, Tensor], storage: Tensor | None = None) -> Tensor:
        """uint8 [bytes] from the wire tensors but for the scales, in `storage` where that has the size.

        Raises ValueError for more inputs than sums of 32 bits hold."""
        tensors = {name: tensor.contiguous() for name, tensor in wire.items()}
        rows, columns = tensors["weight"].shape
        columns *= 2 if is_packed(tensors["weight"]) else 1
        if columns > MOST_COLUMNS:
            raise ValueError(
                f"a layer of {columns} inputs has sums beyond 32 bits, which parts of {MOST_COLUMNS} do not; add it to "
                "quantization.ignore or raise rollout.tensor_parallel_size"
            )
        num_bytes = self._functions.qurl_int8_bytes(self._address, rows, columns)
        packed = storage
        if packed is None or packed.nbytes != num_bytes:
            packed = torch.empty(num_bytes, dtype=torch.uint8)
        parts = [tensors[name].data_ptr() if name in wire else None for name in ("weight", "weight_sign", "weight_index")]
        self._functions.qurl_int8_pack(self._address, self._openmp, rows, columns, packed.data_ptr(), *parts)
        return packed

    def unpack(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """int8 [rows, columns]: the codes that were packed, or what was packed expands to."""
        codes = torch.empty((rows, columns), dtype=torch.int8)
        self._functions.qurl_int8_unpack(self._address, self._openmp, rows, columns, packed.data_ptr(), codes.data_ptr())
        return codes

    def quantize_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As Int8's: codes int8 [T, I] and scales float32 [T, 1], NaN for a token that is not finite; x: bfloat16 or float32."""
        x = x.contiguous()
        codes, scales = torch.empty(x.shape, dtype=torch.int8), torch.empty((len(x), 1), dtype=torch.float32)
        self._functions.qurl_int8_encode(
            self._library.path_number, x.data_ptr(), x.dtype == torch.bfloat16, *x.shape, codes.data_ptr(), scales.data_ptr()
        )
        return codes, scales

    def linear(self, x: Tensor, packed: Tensor, row_scales: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, I] -> [T, O] in x's dtype; row_scales: float32 [O, 1]. Others than bfloat16 and float32 are computed in float32."""
        if x.dtype not in _DTYPES:
            return self.linear(x.float(), packed, row_scales, bias).to(x.dtype)
        x = x.contiguous()
        source = (x.data_ptr(), x.dtype == torch.bfloat16, None, None)
        return self._multiply(source, x.shape[0], x.shape[1], packed, row_scales, bias, x.dtype)

    def multiply(
        self, codes: Tensor, scales: Tensor, packed: Tensor, row_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Codes int8 [T, I] and scales float32 [T, 1] of activations -> [T, O] in `dtype`."""
        if dtype not in _DTYPES:
            return self.multiply(codes, scales, packed, row_scales, bias, torch.float32).to(dtype)
        codes, scales = codes.contiguous(), scales.contiguous()
        source = (None, False, codes.data_ptr(), scales.data_ptr())
        return self._multiply(source, codes.shape[0], codes.shape[1], packed, row_scales, bias, dtype)

    def _multiply(
        self, source: tuple[Any, ...], tokens: int, columns: int, packed: Tensor, row_scales: Tensor, bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        if bias is not None and bias.dtype not in _DTYPES:
            bias = bias.float()
        rows = len(row_scales)
        out = torch.empty((tokens, rows), dtype=dtype)
        if tokens and rows:
            self._functions.qurl_int8_linear(
                self._address, self._library.path_number, self._openmp, *source, tokens, packed.data_ptr(), row_scales.data_ptr(),
                rows, columns, None if bias is None else bias.data_ptr(), bias is not None and bias.dtype == torch.bfloat16,
                out.data_ptr(), dtype == torch.bfloat16,
            )  # fmt: skip
        return out


@cache
def kernel_of(format: QuantizationFormat) -> Int8Kernel:
    """One per format and process. Raises KernelsUnavailable."""
    return Int8Kernel(format, load())


def _typed(library: Library) -> Library:
    """Tell ctypes what the functions take."""
    functions = library.functions
    sizes: list[Any] = [c_int64, c_int64]
    functions.qurl_int8_bytes.argtypes = [c_void_p, *sizes]
    functions.qurl_int8_bytes.restype = c_int64
    functions.qurl_int8_pack.argtypes = [c_void_p, c_void_p, *sizes, *[c_void_p] * 4]
    functions.qurl_int8_unpack.argtypes = [c_void_p, c_void_p, *sizes, c_void_p, c_void_p]
    functions.qurl_int8_encode.argtypes = [c_int, c_void_p, c_int, *sizes, c_void_p, c_void_p]
    functions.qurl_int8_linear.argtypes = [
        c_void_p, c_int, c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, *sizes, c_void_p, c_int,
        c_void_p, c_int,
    ]  # fmt: skip
    for name in ("pack", "unpack", "encode", "linear"):
        getattr(functions, f"qurl_int8_{name}").restype = None
    return library
