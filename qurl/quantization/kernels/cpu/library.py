"""The compiled loops as a shared library of plain C functions.

It is compiled from the sources beside this file by the system's compiler, in seconds because no header of torch or Python is read,
and kept in the user's cache under a name that says what it was compiled from. Which instructions are used is decided when it runs:
a cache that several machines share serves them all. QURL_CPU_KERNELS, one of PATHS or off, overrides the choice, for tests."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = (
    "lobcq.cpp", "avx2.h", "avx512.h", "portable.h", "books.h", "tiles.h",
    "int8.cpp", "int8_avx2.h", "int8_avx512.h", "int8_portable.h", "int8_tiles.h",
    "lookup.cpp", "nibbles.h", "tensors.h", "threads.h",
)  # fmt: skip
FLAGS = ("-std=c++17", "-O3", "-fno-tree-reassoc", "-ffp-contract=off", "-fPIC", "-shared")
COMPILERS = ("c++", "g++", "clang++")
PATHS = ("portable", "avx2", "avx512")
"""Sets of instructions, as the library numbers them."""

_BUILD_TIMEOUT_S = 300
_RUNTIME = ("GOMP_parallel", "GOMP_barrier", "omp_get_max_threads", "omp_in_parallel")


class KernelsUnavailable(RuntimeError):
    """Why this machine has no compiled loops, and what would help; one line."""


class OpenMp(ctypes.Structure):
    """Entry points of the OpenMP runtime that torch uses."""

    _fields_ = [(name, ctypes.c_void_p) for name in _RUNTIME]


class Library:
    """The functions, torch's threads and the path that was chosen."""

    def __init__(self, functions: ctypes.CDLL, path: str) -> None:
        self.functions = functions
        self.path = path
        self.path_number = PATHS.index(path)
        self._openmp = _openmp()
        self.openmp = ctypes.addressof(self._openmp)
        functions.qurl_read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        functions.qurl_read.restype = ctypes.c_uint64

    def read(self, address: int, num_bytes: int) -> int:
        """Read memory as fast as torch's threads can, nothing else; returns a sum that depends on all of it."""
        return self.functions.qurl_read(self.openmp, address, num_bytes)


def load() -> Library:
    """Compiles where that has not been done. Raises KernelsUnavailable, for the same reason every time."""
    found = _attempt()
    if isinstance(found, KernelsUnavailable):
        raise found
    return found


@cache
def _attempt() -> Library | KernelsUnavailable:
    try:
        return _load()
    except KernelsUnavailable as error:
        return error


def _load() -> Library:
    asked = os.environ.get("QURL_CPU_KERNELS", "")
    if asked == "off":
        raise KernelsUnavailable("QURL_CPU_KERNELS=off")
    try:
        functions = ctypes.CDLL(str(_compiled()))
    except OSError as error:
        raise KernelsUnavailable(f"compiled kernels cannot be kept or loaded: {error}; set XDG_CACHE_HOME to a folder") from error
    available = PATHS[: functions.qurl_num_paths()]
    if asked and asked not in available:
        raise KernelsUnavailable(f"QURL_CPU_KERNELS={asked}: this CPU has {', '.join(available)}; or off")
    return Library(functions, asked or available[-1])


def _compiled() -> Path:
    """The library's file. One process at a time compiles; a killed one leaves nothing that the next would wait for or load."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), "")
    if not compiler:
        raise KernelsUnavailable("there is no C++ compiler; install g++ or set CXX")
    content = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SOURCES)
    key = hashlib.sha256("\n".join((content, compiler, *FLAGS, platform.machine())).encode()).hexdigest()[:16]
    folder = build_folder()
    library = folder / f"kernels-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=folder) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel drops it with the process
        if not library.exists():
            built = Path(scratch) / library.name
            _compile(compiler, built)
            built.replace(library)
    return library


def build_folder() -> Path:
    """TORCH_EXTENSIONS_DIR where it is set, else in the cache of the user."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_home / "qurl") / "cpu_kernels"


def _compile(compiler: str, out: Path) -> None:
    command = [*shlex.split(compiler), *FLAGS, "-o", str(out), *(str(FOLDER / name) for name in SOURCES if name.endswith(".cpp"))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"the compiler failed: {error}; set CXX to one that works") from error
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:].strip())
        raise KernelsUnavailable(f"{compiler} failed: {reason}; set CXX to GCC 10, Clang 12 or newer")


def _openmp() -> OpenMp:
    process = ctypes.CDLL(None)  # torch's runtime is among the symbols that all libraries see
    missing = [name for name in _RUNTIME if not hasattr(process, name)]
    if missing:
        raise KernelsUnavailable(f"torch has no OpenMP runtime with {missing[0]}; install torch from its own wheels")
    return OpenMp(*(ctypes.cast(getattr(process, name), ctypes.c_void_p).value for name in _RUNTIME))
