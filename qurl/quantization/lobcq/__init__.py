"""LO-BCQ: locally optimal block clustered quantization (Elangovan et al., arXiv:2502.05376).

A weight or a token's activations are cut into arrays of L_A inputs with an E4M3 scale each, an array into blocks of L_b inputs.
Every block names one of N_c codebooks of 16 whole numbers, every input one of the 16; a number takes 4 + log2(N_c)/L_b + 8/L_A
bits. The codebooks are found once, by alternating the choice of a book for each block with Lloyd-Max steps on each book's numbers,
then frozen and shared by weights and activations of all layers and models; or they are those of one model, its layers or operands.

    layout         L_b, L_A, N_c and the bits of a codeword
    codebooks      the frozen numbers, files of this package known by their hash
    codebook_sets  which layer and operand has which
    calibration    how they are found; `python -m qurl.quantization.lobcq.calibrate` makes the files
    format         encode, decode and the arithmetic of a layer
    assign         `quantization.codebooks`: a format with others than the package's

The paper has no published code. What follows it from its text: the format, the two alternating steps, codewords of 6 bits. What is
reconstructed: the normalization (an equivalent form, see format), the initialization and what the codebooks are calibrated on,
which here are synthetic weights and activations, see samples. Codewords of 8 bits are ours."""

from qurl.quantization.lobcq.assign import with_codebooks
from qurl.quantization.lobcq.codebook_sets import CodebookSets, LayerCodebooks
from qurl.quantization.lobcq.codebooks import Codebooks, load_codebooks
from qurl.quantization.lobcq.format import LoBcq
from qurl.quantization.lobcq.layout import Layout

__all__ = ["CodebookSets", "Codebooks", "LayerCodebooks", "Layout", "LoBcq", "load_codebooks", "with_codebooks"]
