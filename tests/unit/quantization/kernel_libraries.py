"""The compiled loops, once for every set of instructions that can run here."""

import ctypes
import hashlib
import os
import shlex
import shutil
from pathlib import Path

import pytest

from qurl.quantization.kernels.cpu import library
from qurl.quantization.kernels.cpu.library import PATHS, KernelsUnavailable, Library


def libraries():
    """By name. Skips the module that asks where nothing can be compiled."""
    try:
        loaded = library.load().functions
    except KernelsUnavailable as error:
        pytest.skip(f"no compiled kernels: {error}", allow_module_level=True)
    found = {path: Library(loaded, path) for path in PATHS[: loaded.qurl_num_paths()]}
    if "avx2" in found:  # other processors have no use for the loops
        found["emulated_avx512"] = Library(_emulated(), "avx512")
    return found


def _emulated():
    """The library with functions in place of AVX-512's instructions, so that its loops run on any x86 processor with AVX2."""
    header = Path(__file__).with_name("emulated_avx512.h")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, library.COMPILERS))
    version = hashlib.sha256(header.read_bytes()).hexdigest()[:8]  # so that the cache has no other one's
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "SOURCES", [name for name in library.SOURCES if name != "lookup.cpp"])
        patch.setenv("CXX", f"{compiler} -include {shlex.quote(str(header))} -DVERSION=0x{version}")
        return ctypes.CDLL(str(library._compiled()))
