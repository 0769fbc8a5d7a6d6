"""LO-BCQ on a GPU, in Triton: weights stay packed as they travel, codewords are multiplied as the small whole numbers they are.

    rotate     activations, where the format has a rotation
    encode     activations: per token a global scale, E4M3 scales of arrays, the search of all books
    codewords  packed codes -> codewords, by byte permutes or by gathers
    matmul     codewords times codewords (W4A4), or times activations (W4A16), rescaled per array

A codeword needs 8 bits at most, so it is exact in int8, in bfloat16 and in float16, and a sum of L_A products of two is exact in
int32. Scales meet the sums, never the codewords: nothing is rounded before the float32 sum over arrays.

Speed was not measured, and nothing here has run on a GPU: the kernels compile for one, and under Triton's interpreter they equal
the format's own arithmetic (tests/unit/quantization/test_lobcq_triton.py). tests/gpu/test_lobcq_triton_gpu.py compares on a GPU.

The only package of qurl that imports Triton; only the code that chooses a kernel for a layer on a GPU imports it."""

from qurl.quantization.kernels.triton.codewords import codebook_bytes, nearest_codewords
from qurl.quantization.kernels.triton.encode import lobcq_encode
from qurl.quantization.kernels.triton.matmul import lobcq_matmul
from qurl.quantization.kernels.triton.rotate import rotated

__all__ = ["codebook_bytes", "lobcq_encode", "lobcq_matmul", "nearest_codewords", "rotated"]
