"""INT8 codes looked up in tables of 256, at about the speed of memory; for Ax-BxP, whose tables say what is kept of a code."""

from __future__ import annotations

import logging
from ctypes import c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from qurl.quantization.kernels.cpu.library import KernelsUnavailable, Library, load

logger = logging.getLogger(__name__)


class LookupKernel:
    """The function of one library."""

    def __init__(self, library: Library) -> None:
        self._library = library  # which owns what `openmp` points to
        self._look_up = library.functions.qurl_look_up
        self._look_up.argtypes = [c_int, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p]
        self._look_up.restype = None

    def look_up(self, codes: Tensor, values: Tensor, lowest: Tensor, group: int) -> Tensor:
        """int8 [..., I] -> the entries that the codes' bytes name in a row of `values`, int8 [R, 256].

        Each `group` codes, from the first of the last dimension on, share the highest row that one of them asks for in `lowest`,
        int8 [256], which is 0 for code 0; in groups of 1 all have the first row. group: a power of 2 up to 128."""
        codes, values = codes.contiguous(), values.contiguous()
        found = torch.empty_like(codes)
        if columns := codes.numel() and codes.shape[-1]:
            self._look_up(
                self._library.path_number, self._library.openmp, codes.data_ptr(), codes.numel() // columns, columns,
                values.data_ptr(), lowest.data_ptr(), group, found.data_ptr(),
            )  # fmt: skip
        return found


@cache
def lookup_kernel() -> LookupKernel | None:
    """One per process; None, and a warning, on a machine that has no compiled loops."""
    try:
        return LookupKernel(load())
    except KernelsUnavailable as error:
        logger.warning("codes are looked up in torch, which is slower (%s)", error)
        return None
