"""NVFP4 W4A4: E2M1 numbers in groups of 16 inputs with an E4M3 scale each, and one float32 scale for all of them.

The float32 scale, of a weight or of a token's activations, is 6 * 448 / amax, such that the group of the largest number gets E4M3's
largest scale; the numbers are code * weight_scale / weight_global_scale. These are NVIDIA's and compressed-tensors' definitions for
weights. For activations theirs is one global scale per layer, calibrated beforehand; one per token needs no calibration, is never
coarser and does not depend on what else is in the batch. Rounding an E4M3 scale down cuts off up to a sixteenth of the largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qurl.quantization.e2m1 import LARGEST, pack_e2m1, round_to_e2m1, unpack_e2m1
from qurl.quantization.grouped import GroupedFormat
from qurl.quantization.rounding import E4M3_LARGEST
from qurl.quantization.two_level import SMALLEST_E4M3, e4m3_scales, global_scale_of

GROUP = 16


class NvFp4(GroupedFormat):
    """weight uint8 [O, I/2], two codes a byte; weight_scale float8_e4m3fn [O, I/16]; weight_global_scale float32 [1]."""

    name = "nvfp4"
    block = (1, GROUP)
    matrix_tensors = frozenset({"weight_global_scale"})
    rounds_stochastically = True

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Codes and scales; ValueError for NaN, Inf or a number of inputs that is no multiple of 16."""
        groups = self.weight_groups(weight)
        amax = groups.abs().amax(dim=-1)
        global_scale = global_scale_of(amax.amax().view(1), LARGEST)
        return _wire(groups, e4m3_scales(amax, global_scale, LARGEST, SMALLEST_E4M3), global_scale)

    def encode_stochastically(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Unbiased codes, under the next larger E4M3 scale where that of `encode` would cut off the group's largest."""
        groups = self.weight_groups(weight)
        amax = groups.abs().amax(dim=-1)
        global_scale = global_scale_of(amax.amax().view(1), LARGEST)
        scale = e4m3_scales(amax, global_scale, LARGEST, SMALLEST_E4M3)
        cuts_off = (amax > LARGEST * scale.float() / global_scale) & (scale.float() < E4M3_LARGEST)
        larger = (scale.view(torch.uint8) + cuts_off.to(torch.uint8)).view(torch.float8_e4m3fn)
        return _wire(groups, larger, global_scale, generator)

    def decode(self, wire: Mapping[str, Tensor]) -> Tensor:
        """[O, I] float32."""
        scale = wire["weight_scale"].float() / wire["weight_global_scale"]
        return self.ungrouped(self.grouped(unpack_e2m1(wire["weight"])) * scale[..., None])

    def quantize_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E2M1 numbers [..., I] and scales [..., I/16], the E4M3 one over the token's, both as float32.

        NaN or Inf in a token makes its scales, and what is computed from them, non-finite."""
        groups = self.activation_groups(x)
        amax = groups.abs().amax(dim=-1)
        global_scale = global_scale_of(amax.amax(dim=-1, keepdim=True), LARGEST)
        scale = e4m3_scales(amax, global_scale, LARGEST, SMALLEST_E4M3).float() / global_scale
        return round_to_e2m1(groups / scale[..., None]).flatten(-2), scale

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """4, a byte per group and a float32."""
        return 4.0 + 8.0 / GROUP + 32.0 / (shape[0] * shape[1])


def _wire(groups: Tensor, scale: Tensor, global_scale: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    numbers = round_to_e2m1(groups / (scale.float() / global_scale)[..., None], generator)
    return {"weight": pack_e2m1(numbers.flatten(-2)), "weight_scale": scale, "weight_global_scale": global_scale}
