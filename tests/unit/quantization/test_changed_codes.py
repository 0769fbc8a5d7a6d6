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


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8_block"])
def test_a_moved_weight_changes_one_code(name):
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    moved = weight.clone()
    smallest = int(weight.abs().argmin())  # not the one that sets a scale
    moved.view(-1)[smallest] += 0.1
    assert changed_codes(FORMATS[name].encode(weight), FORMATS[name].encode(moved)) == (1, 128)


def test_fp8_signs_of_zero_are_different_bits():
    zero = torch.zeros(2, 2).to(torch.float8_e4m3fn)
    assert changed_codes({"w": zero}, {"w": (-torch.zeros(2, 2)).to(torch.float8_e4m3fn)}) == (4, 4)


def test_unlike_versions_are_refused():
    codes = torch.zeros(2, 2, dtype=torch.int8)
    with pytest.raises(ValueError, match="do not both hold"):
        changed_codes({"a": codes}, {"b": codes})
    with pytest.raises(ValueError, match="a was"):
        changed_codes({"a": codes}, {"a": codes[:1]})
