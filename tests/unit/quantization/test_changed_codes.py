"""Counting the codes that a step moves."""

import pytest
import torch

from qurl.quantization import FORMATS, changed_codes


def test_only_codes_are_counted_and_only_changed_bits_count():
    old = {"a.weight": torch.tensor([[1, 2, 3]], dtype=torch.int8), "a.weight_scale": torch.ones(1, 1), "norm": torch.ones(9)}
    new = {name: tensor + 1 for name, tensor in old.items()}
    new["a.weight"][0, 1] = 2
    assert changed_codes(old, new) == (2, 3)
    assert changed_codes(old, old) == (0, 3)
    assert changed_codes({}, {}) == (0, 0)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "none"])
@pytest.mark.parametrize("column", [4, 5])  # the two halves of a byte
def test_a_moved_weight_changes_one_code(name, column):
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    moved = weight.clone()
    weight[3, column], moved[3, column] = 0.0, 0.9  # neither sets a scale
    assert changed_codes(FORMATS[name].encode(weight), FORMATS[name].encode(moved)) == (1, 1024)


def test_fp8_signs_of_zero_are_different_bits():
    zero = torch.zeros(2, 2).to(torch.float8_e4m3fn)
    assert changed_codes({"weight": zero}, {"weight": (-torch.zeros(2, 2)).to(torch.float8_e4m3fn)}) == (4, 4)


def test_unlike_versions_are_refused():
    codes = torch.zeros(2, 2, dtype=torch.int8)
    with pytest.raises(ValueError, match="do not both hold"):
        changed_codes({"a": codes}, {"b": codes})
    with pytest.raises(ValueError, match="a was"):
        changed_codes({"a": codes}, {"a": codes[:1]})
