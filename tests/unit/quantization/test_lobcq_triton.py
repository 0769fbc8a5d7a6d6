"""LO-BCQ's Triton kernels where there is no GPU: what they compute, and that they compile for one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qurl.quantization.kernels.triton.encode import encode_kernel  # noqa: E402
from qurl.quantization.kernels.triton.matmul import add_splits_kernel, multiply_kernel  # noqa: E402
from qurl.quantization.kernels.triton.rotate import rotate_kernel  # noqa: E402

LAYOUT = {"BLOCK": 8, "ARRAY": 64}
WEIGHT = {"weight": "*i32", "selectors": "*u8", "scales": "*u8", "global_scale": "*fp32"}
SIZES = ("columns", "tokens", "rows", "arrays", "selector_bytes", "splits", "arrays_per_split")
ENCODE = (
    {"x": "*bf16", "codewords": "*i8", "scales": "*fp32", "nearest": "*i8"},
    LAYOUT | {"BOOKS": 16, "LARGEST": 31, "CHUNK": 1024},
)
W4A4 = (
    {"out": "*fp32", "x": "*i8", "x_scales": "*fp32", "codebooks": "*i32", **WEIGHT},
    LAYOUT | {"BITS": 4, "ROWS": 128, "TOKENS": 16, "SHARED": True, "PERMUTE": True},
)
W4A16 = (
    {"out": "*bf16", "x": "*bf16", "codebooks": "*i8", "bias": "*bf16", **WEIGHT},
    LAYOUT | {"BITS": 4, "ROWS": 128, "TOKENS": 64, "SHARED": False, "PERMUTE": False},
)
ROTATE = ({"x": "*bf16", "out": "*fp32"}, {"STAGES": 7, "CHUNK": 1024})
ADD = ({"out": "*bf16", "parts": "*fp32", "global_scale": "*fp32", "bias": "*bf16"}, {"ROWS": 256, "TOKENS": 4})


def test_under_the_interpreter_they_equal_the_format():
    """In a process of its own: the interpreter must be chosen before Triton is imported."""
    tests = Path(__file__).with_name("interpreted_lobcq.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-4000:] + result.stderr[-1000:]


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 leaves nothing to compile")
@pytest.mark.parametrize(
    "kernel,types,capability",
    [(encode_kernel, ENCODE, 80), (rotate_kernel, ROTATE, 80), (multiply_kernel, W4A4, 90), (multiply_kernel, W4A16, 80),
     (add_splits_kernel, ADD, 90)],
)
def test_they_compile_for_a_gpu_to_arithmetic_that_rounds_like_the_format_s(monkeypatch, tmp_path, kernel, types, capability):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers, constants = types
    numbers = {"factor": "fp32", **dict.fromkeys(SIZES, "i32")}
    signature = {name: (pointers | numbers).get(name, "constexpr") for name in kernel.arg_names}
    constants = {name: constants.get(name) for name, type_ in signature.items() if type_ == "constexpr"}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": 4 if constants.get("TOKENS") != 64 else 8, "enable_fp_fusion": False}
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
    ptx = compiled.asm["ptx"]
    assert compiled.asm["cubin"]
    assert "fma" not in ptx and "div.full" not in ptx and "div.approx" not in ptx  # these round otherwise
    assert ("prmt.b32 low" in ptx) == bool(constants.get("PERMUTE"))
    if kernel is multiply_kernel:
        assert "mma" in ptx  # tensor cores
