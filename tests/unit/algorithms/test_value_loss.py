"""The critic's loss against a slow loop in float64."""

import math

import pytest
import torch

from qurl.algorithms import clipped_value_loss


@pytest.mark.parametrize("clip", [0.2, None])
def test_the_loss_and_its_gradient_equal_a_token_by_token_loop(clip):
    g = torch.Generator().manual_seed(0)
    values, old, returns = (torch.randn(5, 40, generator=g, dtype=torch.float64) for _ in range(3))
    values = (old + 0.3 * values).requires_grad_()
    mask = torch.rand(5, 40, generator=g) < 0.7
    loss, is_clipped = clipped_value_loss(values, old, returns, mask, clip)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    for b in range(5):
        for t in range(40):
            v, o, r = (x[b, t].item() for x in (values, old, returns))
            near = v if clip is None else min(max(v, o - clip), o + clip)
            worse = mask[b, t] and (near - r) ** 2 > (v - r) ** 2
            expected = max((v - r) ** 2, (near - r) ** 2) / 2 if mask[b, t] else 0.0
            assert loss[b, t].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
            assert is_clipped[b, t].item() == bool(worse)
            assert gradient[b, t].item() == pytest.approx(0.0 if worse or not mask[b, t] else v - r, rel=1e-12)
    assert is_clipped.any() == (clip is not None)


def test_what_lies_under_the_mask_does_not_matter():
    mask = torch.tensor([[False, True]])
    values = torch.tensor([[math.nan, 0.5]], requires_grad=True)
    loss, is_clipped = clipped_value_loss(values, torch.tensor([[math.inf, 0.0]]), torch.tensor([[math.nan, 1.0]]), mask, 0.2)
    loss.sum().backward()
    assert loss.tolist() == [[0.0, pytest.approx(0.5 * 0.8**2)]] and is_clipped.tolist() == [[False, True]]
    assert values.grad.tolist() == [[0.0, 0.0]]
