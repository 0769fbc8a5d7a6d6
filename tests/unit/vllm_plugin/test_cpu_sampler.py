"""Inverse-CDF sampling against softmax in float64."""

import math
import os

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import pytest
import torch

pytest.importorskip("vllm")

from qurl.vllm_plugin.cpu_sampler import BLOCK, draw, uniform


def logits_of(rows, size, seed=0):
    return 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 7, BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draw_is_the_first_token_whose_cumulative_probability_exceeds_the_number(size, dtype):
    logits, temperatures = logits_of(40, size).to(dtype), [0.5 + index / 20 for index in range(40)]
    uniforms = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = draw(logits, uniforms, temperatures)
    for row, temperature, number, token, logprob in zip(logits, temperatures, uniforms, tokens, logprobs, strict=True):
        exact = (row.double() / temperature).log_softmax(0)
        cumulative = exact.exp().cumsum(0)
        # float32 sums are off by less than 1e-6, so a number that close to an edge may fall to either side
        assert cumulative[token] > number - 1e-6 and (token == 0 or cumulative[token - 1] < number + 1e-6)
        assert logprob.item() == pytest.approx(exact[token].item(), abs=2e-5)  # roundings of float32 logits up to 30


def test_frequencies_pass_a_chi_square_test():
    num_draws, logits = 20000, logits_of(1, 300)
    pairs = ((seed, position) for seed in range(100) for position in range(num_draws // 100))
    numbers = torch.tensor([uniform(*pair) for pair in pairs], dtype=torch.float64)
    tokens, _ = draw(logits.expand(num_draws, -1), numbers)
    expected = num_draws * logits[0].double().softmax(0)
    common = expected >= 5
    counts = torch.bincount(tokens.squeeze(1), minlength=300).double()
    observed = torch.cat([counts[common], counts[~common].sum(0, keepdim=True)])
    expected = torch.cat([expected[common], expected[~common].sum(0, keepdim=True)])
    statistic, freedom = ((observed - expected) ** 2 / expected).sum().item(), len(expected) - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)  # four standard deviations, seeds are fixed


def test_masked_tokens_are_never_drawn_at_either_end_of_the_unit_interval():
    logits = logits_of(1, 2 * BLOCK + 3)
    logits[:, : BLOCK + 2], logits[:, -2:] = -math.inf, -math.inf
    edge = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs = draw(logits.expand(2, -1), edge)
    assert tokens.flatten().tolist() == [BLOCK + 2, 2 * BLOCK]
    assert logprobs.isfinite().all()


def test_a_row_does_not_depend_on_its_batch():
    logits, numbers = logits_of(33, 5000).bfloat16(), torch.linspace(0, 0.999, 33, dtype=torch.float64)
    tokens, logprobs = draw(logits, numbers)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    for rows in (order, order[:1], order[5:8]):
        some_tokens, some_logprobs = draw(logits[rows], numbers[rows])
        assert torch.equal(some_tokens, tokens[rows]) and torch.equal(some_logprobs, logprobs[rows])


def test_non_finite_logits_give_a_token_of_the_vocabulary_and_a_log_probability_that_is_nan():
    logits = logits_of(3, BLOCK + 1)
    logits[0, 5], logits[1], logits[2, 9] = math.nan, -math.inf, math.inf
    tokens, logprobs = draw(logits, torch.full((3,), 0.5, dtype=torch.float64))
    assert logprobs.isnan().all() and (tokens >= 0).all() and (tokens <= BLOCK).all()


def test_numbers_of_neighbouring_seeds_and_positions_are_spread_evenly():
    numbers = torch.tensor([[uniform(seed, position) for position in range(64)] for seed in range(-8, 56)], dtype=torch.float64)
    counts = torch.histc(numbers, bins=16, min=0, max=1)
    assert ((counts - 256).abs() < 4 * 16).all()  # four standard deviations of a count of 256
    flat = numbers.flatten() - numbers.mean()
    assert abs((flat[1:] * flat[:-1]).mean() / flat.var()) < 4 / 64  # nor along positions: 4096 pairs
    assert uniform(3, 4) == uniform(3, 4) != uniform(4, 3)
