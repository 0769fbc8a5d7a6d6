"""FP8 W8A8 in E4M3 with one scale per 128x128 weight block and per 128 activations of a token.

Blocks at the lower and right edge are smaller where a dimension is no multiple of 128. Where vLLM fuses matrices (q, k, v; gate,
up) it refuses rows that are no multiple of 128 in any but the last of them, because blocks would straddle the seam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qurl.quantization.base import QuantizationFormat, scale_to, weight_matrix
from qurl.quantization.fp8 import LARGEST_CODE
from qurl.quantization.rounding import to_e4m3

BLOCK = 128
SMALLEST_ACTIVATION_SCALE = 1e-10 / LARGEST_CODE
"""vLLM's floor for the scale of a group of activations."""


class Fp8Block(QuantizationFormat):
    """weight float8_e4m3fn [O, I], weight_scale float32 [ceil(O/128), ceil(I/128)]."""

    name = "fp8_block"
    block = (BLOCK, BLOCK)
    rounds_stochastically = True
    scheme = {
        "format": "float-quantized",
        "weights": {"type": "float", "strategy": "block", "block_structure": [BLOCK, BLOCK]},
        "input_activations": {"type": "float", "strategy": "group", "group_size": BLOCK},
    }

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Per-block codes and scales; ValueError for NaN or Inf."""
        scaled, scale = self._scaled(weight)
        return {"weight": scaled.to(torch.float8_e4m3fn), "weight_scale": scale}

    def encode_stochastically(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """encode with unbiased codes."""
        scaled, scale = self._scaled(weight)
        return {"weight": to_e4m3(scaled, generator), "weight_scale": scale}

    def _scaled(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        matrix = weight_matrix(weight)
        rows, columns = (num_blocks(size) for size in matrix.shape)
        padded = functional.pad(matrix.abs(), (0, columns * BLOCK - matrix.shape[1], 0, rows * BLOCK - matrix.shape[0]))
        scale = scale_to(padded.view(rows, BLOCK, columns, BLOCK).amax(dim=(1, 3)), LARGEST_CODE)
        return matrix / spread(scale, matrix.shape), scale

    def decode(self, wire: Mapping[str, Tensor]) -> Tensor:
        """[O, I] float32."""
        return wire["weight"].float() * spread(wire["weight_scale"], wire["weight"].shape)

    def quantize_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float8_e4m3fn codes [..., I] and float32 scales [..., ceil(I/128)]: max(amax, 1e-10)/448, code = x / scale."""
        x = x.float()
        groups = num_blocks(x.shape[-1])
        padded = functional.pad(x.abs(), (0, groups * BLOCK - x.shape[-1]))
        scale = scale_to(padded.unflatten(-1, (groups, BLOCK)).amax(dim=-1), LARGEST_CODE, SMALLEST_ACTIVATION_SCALE)
        spread_scale = scale.repeat_interleave(BLOCK, dim=-1)[..., : x.shape[-1]]
        return (x / spread_scale).to(torch.float8_e4m3fn), scale

    def linear(self, x: Tensor, wire: Mapping[str, Tensor], bias: Tensor | None = None) -> Tensor:
        """Per group of 128 inputs a float32 sum of code products (each exact), scaled and added up. [..., O] in x's dtype."""
        codes, scale = self.quantize_activations(x)
        weight = wire["weight"]
        row_scale = wire["weight_scale"].repeat_interleave(BLOCK, dim=0)[: weight.shape[0]]  # [O, groups]
        out = torch.zeros((*x.shape[:-1], weight.shape[0]), dtype=torch.float32, device=x.device)
        for group, (x_codes, w_codes) in enumerate(zip(codes.split(BLOCK, dim=-1), weight.split(BLOCK, dim=1), strict=True)):
            out += (x_codes.float() @ w_codes.float().T) * scale[..., group, None] * row_scale[:, group]
        return (out if bias is None else out + bias.float()).to(x.dtype)

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """8 and a float32 per block."""
        return 8.0 + 32.0 * num_blocks(shape[0]) * num_blocks(shape[1]) / (shape[0] * shape[1])


def num_blocks(size: int) -> int:
    """Blocks that cover `size` rows or columns."""
    return -(-size // BLOCK)


def spread(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """Block scales [ceil(O/128), ceil(I/128)] repeated to one per weight, [O, I]."""
    return scale.repeat_interleave(BLOCK, dim=0)[: shape[0]].repeat_interleave(BLOCK, dim=1)[:, : shape[1]]
