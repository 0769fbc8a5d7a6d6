"""Ax-BxP: approximate blocked computation (Elangovan et al., arXiv:2011.13000).

An INT8 code is a few blocks of K bits. A product of two codes is the sum of the products of their blocks, and some of those are
left out: of each operand only L blocks take part, the uppermost ones (static) or those from the first one that is not 0 on
(dynamic, for each number or for a group of inputs). How many is a setting of each layer and operand, and may change while an engine
lives: the codes are int8's, and so is the wire.

    precision    what can be set, and how it is written
    blocks       codes with fewer blocks, as lookups
    format       the format `axbxp`
    packed       formats that store nothing but the kept blocks of the weights
    assign       `quantization.precision`: which layer has which precision
    cost         what a setting costs
    search       settings for a network, then for each layer and operand, under a bound

On processors with whole INT8 products nothing gets faster: any choice per operand is one INT8 product of codes with blocks set
to 0. What is gained is accuracy figures for hardware with blocks, and with the packed formats bits on the wire.

The paper has no published code. Of its text the abstract and the opening were at hand: blocks, products of a subset of them, one
setting for a network or one for each layer and data structure. What is reconstructed: sign and magnitude, the dynamic choice and
its index, the search. What is ours: rounding to nearest before blocks are dropped, groups of inputs that share an index, balanced
digits, and no retraining."""

from qurl.quantization.axbxp.assign import check_precision, with_precision
from qurl.quantization.axbxp.format import AxBxP
from qurl.quantization.axbxp.packed import PackedAxBxP
from qurl.quantization.axbxp.precision import ALL_BLOCKS, Digits, Kept, Precision, all_precisions, parse

__all__ = [
    "ALL_BLOCKS", "AxBxP", "Digits", "Kept", "PackedAxBxP", "Precision", "all_precisions", "check_precision", "parse",
    "with_precision",
]
