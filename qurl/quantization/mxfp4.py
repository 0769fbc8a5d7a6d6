"""MXFP4 W4A4: E2M1 numbers in groups of 32 inputs that share a power of two, for weights and activations alike.

OCP Microscaling Formats (MX) Specification 1.0, sections 5.2 and 6.3: scale 2^(floor(log2(amax)) - 2), numbers rounded to nearest
even and saturating at 6, so what is above 6 scales, at most 8, is cut off. The scale is E8M0, which is the exponent field of a
float32; ours stay within the normal float32 numbers, whose reciprocals are exact too. compressed-tensors has the same codes for
the same scales, but its own observer takes the next power of two from amax = 7 scales on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qurl.quantization.e2m1 import LARGEST, pack_e2m1, round_to_e2m1, unpack_e2m1
from qurl.quantization.grouped import GroupedFormat

GROUP = 32
LARGEST_EXPONENT = 2
"""floor(log2(6))"""
_ARGUMENTS = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": GROUP, "scale_dtype": "torch.uint8",
              "zp_dtype": "torch.uint8"}  # fmt: skip


class MxFp4(GroupedFormat):
    """weight uint8 [O, I/2], two codes a byte; weight_scale uint8 [O, I/32], E8M0: 2^(byte - 127)."""

    name = "mxfp4"
    block = (1, GROUP)
    rounds_stochastically = True
    scheme = {"format": "mxfp4-pack-quantized", "weights": _ARGUMENTS, "input_activations": _ARGUMENTS}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Codes and scales per group; ValueError for NaN, Inf or a number of inputs that is no multiple of 32."""
        groups = self.weight_groups(weight)
        return _wire(groups, _scale_bytes(groups.abs().amax(dim=-1)))

    def encode_stochastically(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Unbiased codes. A weight that is cut off cannot be right on average: where the scale of `encode` has the group's largest
        above 6, it is doubled."""
        groups = self.weight_groups(weight)
        amax = groups.abs().amax(dim=-1)
        scale = _scale_bytes(amax)
        return _wire(groups, scale + (amax > LARGEST * _power_of_two(scale)).to(torch.uint8), generator)

    def decode(self, wire: Mapping[str, Tensor]) -> Tensor:
        """[O, I] float32."""
        numbers = self.grouped(unpack_e2m1(wire["weight"]))
        return self.ungrouped(numbers * _power_of_two(wire["weight_scale"])[..., None])

    def quantize_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E2M1 numbers [..., I] and scales [..., I/32], both as float32, by the rule for weights.

        NaN or Inf in a group makes its scale, and what is computed from it, NaN."""
        groups = self.activation_groups(x)
        amax = groups.abs().amax(dim=-1)
        scale = _scale_bytes(amax)
        codes = round_to_e2m1(groups * _reciprocal(scale)[..., None])
        return codes.flatten(-2), _power_of_two(scale).where(amax.isfinite(), torch.nan)

    def checkpoint_tensors(self, wire: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The codes are called weight_packed."""
        return {"weight_packed": wire["weight"], "weight_scale": wire["weight_scale"]}

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """4 and a byte per group."""
        return 4.0 + 8.0 / GROUP


def _wire(groups: Tensor, scale: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Wire tensors of weights [O, groups, 32] under E8M0 scales [O, groups]."""
    numbers = round_to_e2m1(groups * _reciprocal(scale)[..., None], generator)
    return {"weight": pack_e2m1(numbers.flatten(-2)), "weight_scale": scale}


def _scale_bytes(amax: Tensor) -> Tensor:
    """E8M0 uint8 of 2^(floor(log2(amax)) - 2), at least 2^-126; amax: float32, its exponent field is floor(log2(amax)) + 127."""
    return ((amax.view(torch.int32) >> 23) - LARGEST_EXPONENT).clamp_(min=1).to(torch.uint8)


def _power_of_two(scale: Tensor) -> Tensor:
    """E8M0 1 to 254 -> float32."""
    return (scale.int() << 23).view(torch.float32)


def _reciprocal(scale: Tensor) -> Tensor:
    """E8M0 1 to 253 -> 1/float32."""
    return ((254 - scale.int()) << 23).view(torch.float32)
