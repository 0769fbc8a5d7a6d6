"""NF4 W4A16: sixteen quantiles of a normal distribution, a bfloat16 scale for 64 inputs of a row
(quantization.group_size: another number); activations stay as they are.

Dettmers et al. 2023 (QLoRA, arXiv:2305.14314) section 3, whose implementation the numbers are from; there scales are float32 and
groups run over the flattened weight, which is the same where I is a multiple of 64. The scale is amax rounded up to bfloat16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qurl.quantization.base import scale_to
from qurl.quantization.grouped import GroupedFormat, bfloat16_not_below
from qurl.quantization.packing import look_up, pack

GROUP = 64
NUMBERS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""By code."""
_NUMBERS = torch.tensor(NUMBERS)


class Nf4(GroupedFormat):
    """weight uint8 [O, I/2], two codes a byte; weight_scale bfloat16 [O, I/64], or another group size."""

    name = "nf4"
    block = (1, GROUP)
    keeps_activations = True
    shorter_blocks = "set quantization.group_size=32 or another divisor, "

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The nearest numbers, of two equally near the smaller; ValueError for NaN, Inf or a number of inputs that is no multiple
        of the group."""
        groups = self.weight_groups(weight)
        scale = bfloat16_not_below(scale_to(groups.abs().amax(dim=-1), 1.0))
        middles = ((_NUMBERS[:-1] + _NUMBERS[1:]) / 2).to(groups.device)
        scaled = (groups / scale.float()[..., None]).contiguous()
        codes = torch.bucketize(scaled, middles, out_int32=True)
        return {"weight": pack(codes.to(torch.uint8).flatten(-2)), "weight_scale": scale}

    def decode(self, wire: Mapping[str, Tensor]) -> Tensor:
        """[O, I] float32."""
        return self.ungrouped(self.grouped(look_up(wire["weight"], _NUMBERS)) * wire["weight_scale"].float()[..., None])

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """4 and a bfloat16 per group."""
        return 4.0 + 16.0 / self.block[1]
