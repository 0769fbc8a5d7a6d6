"""Groups of int4 and nf4 that are not the formats' own."""

import pytest
import torch

from qurl.quantization import FORMATS, resolved_format
from qurl.quantization.group_size import with_group_size

OWN = {"int4": 128, "nf4": 64}


@pytest.mark.parametrize("name", OWN)
def test_a_group_has_the_scale_and_codes_that_it_has_alone(name):
    format = resolved_format(name, group_size=32)
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    wire = format.encode(weight)
    for index, group in enumerate(weight.split(32, dim=1)):
        alone = with_group_size(FORMATS[name], 32).encode(group.contiguous())
        assert wire["weight"][:, 16 * index : 16 * (index + 1)].equal(alone["weight"])
        assert wire["weight_scale"][:, index : index + 1].equal(alone["weight_scale"])
    assert format.bits_per_weight((6, 96)) == 4.5
    assert (format.decode(wire) - weight).norm() < 0.12 * weight.norm()


@pytest.mark.parametrize("name", OWN)
def test_the_own_size_is_the_format_itself_and_another_one_is_another_key(name):
    assert with_group_size(FORMATS[name], OWN[name]) is with_group_size(FORMATS[name], 0) is FORMATS[name]
    keys = {resolved_format(name, group_size=size, rotation=rotation).key for size in (0, 32, 96) for rotation in (0, 16)}
    assert len(keys) == 6 and f"{name}:32@16" in keys
    assert FORMATS[name].block == (1, OWN[name])  # the table's own is as it was


@pytest.mark.parametrize("name", OWN)
def test_a_rotation_and_a_group_that_do_not_divide_each_other_want_both(name):
    format = resolved_format(name, group_size=96, rotation=64)
    assert format.column_multiple == 192
    format.check_columns(576)
    with pytest.raises(ValueError, match="not 96"):
        format.check_columns(96)
    weight = torch.randn(4, 192, generator=torch.Generator().manual_seed(0))
    assert (format.decode(format.encode(weight)) - weight).norm() < 0.15 * weight.norm()


@pytest.mark.parametrize(("name", "size", "told"), [
    ("int4", 12, "quantization.group_size=12 is no multiple of 8"), ("int4", -8, "no multiple of 8"), ("nf4", 2048, "up to 1024"),
    ("int8", 64, "is for int4 and nf4, and int8 is given"), ("mxfp4", 16, "is for int4 and nf4"),
])  # fmt: skip
def test_sizes_that_cannot_be_are_refused(name, size, told):
    with pytest.raises(ValueError, match=told):
        resolved_format(name, group_size=size)


def test_an_error_of_width_names_the_key():
    with pytest.raises(ValueError, match="of 128 input features, not 576; .* set quantization.group_size=32 or another divisor"):
        FORMATS["int4"].check_columns(576)
