"""What a precision costs, against INT8.

Block products and stored bits are counts. Gains are a model of our own: they say how a machine would fare whose products cost what
their bits do and whose memory costs what it moves. The paper's factors (1.1 to 1.74 in energy and 1.02 to 2 in performance for one
setting per network, 1.12 to 2.23 and 1.14 to 2.34 per layer and data structure) come from a synthesized accelerator that this does
not describe. A processor with whole INT8 products, a GPU or CPU, gains nothing from fewer block products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qurl.quantization.axbxp.precision import MAGNITUDE_BITS, Digits, Kept, Precision

INT8_BITS = 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of one multiplication and its operands; averages where it stands for several layers."""

    products: float  # bits multiplied with bits over the 64 of INT8
    weight_bits: float  # stored for a weight, without the scale of its row
    activation_bits: float  # likewise

    def energy_gain(self, compute_share: float) -> float:
        """A model: INT8's energy over this one's, where a share of INT8's goes to products, the rest to moving operands. No share
        is right for all machines and batch sizes. ValueError outside [0, 1]."""
        if not 0 <= compute_share <= 1:
            raise ValueError(f"compute_share={compute_share} is no share; use a number in [0, 1]")
        moved = (self.weight_bits + self.activation_bits) / (2 * INT8_BITS)
        return 1.0 / (compute_share * self.products + (1 - compute_share) * moved)

    def performance_gain(self, is_memory_bound: bool) -> float:
        """A model: INT8's time over this one's, where time goes to weights read (decoding few tokens) or else to products."""
        return INT8_BITS / self.weight_bits if is_memory_bound else 1.0 / self.products


def cost(precision: Precision) -> Cost:
    """|kept pairs of blocks| (K/8)^2, and the bits of both operands."""
    pairs = precision.weight.blocks * precision.activation.blocks - precision.drops_low_product
    return Cost(
        products=pairs * (precision.block_bits / INT8_BITS) ** 2,
        weight_bits=stored_bits(precision, precision.weight),
        activation_bits=stored_bits(precision, precision.activation),
    )


def stored_bits(precision: Precision, kept: Kept) -> float:
    """Sign (balanced digits have none), kept blocks, and a share of the number of the lowest where it varies; 8 for all blocks."""
    dropped = precision.num_blocks - kept.blocks
    if dropped == 0:
        return INT8_BITS
    bits = precision.block_bits
    is_balanced = precision.digits is Digits.balanced
    if kept.group is not None:
        return (not is_balanced) + kept.blocks * bits + dropped.bit_length() / kept.group
    return kept.blocks * bits if is_balanced else 1.0 + MAGNITUDE_BITS - dropped * bits


def network_cost(precisions: Mapping[str, Precision], num_weights: Mapping[str, float]) -> Cost:
    """The mean over layers, each counted as often as it has weights: the share of its products in those of a token."""
    total = sum(num_weights[name] for name in precisions)
    costs = [(num_weights[name] / total, cost(precision)) for name, precision in precisions.items()]
    return Cost(
        products=sum(share * each.products for share, each in costs),
        weight_bits=sum(share * each.weight_bits for share, each in costs),
        activation_bits=sum(share * each.activation_bits for share, each in costs),
    )
