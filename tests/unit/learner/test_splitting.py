"""Shares of ranks: whole prompts per mini-batch, nothing lost, tokens balanced."""

import pytest
from learner_cases import build_sample, build_samples

from qurl.learner.splitting import split_for_ranks


def ids(samples):
    return [sample.sample_id for sample in samples]


def test_mini_batches_hold_whole_prompts_in_order():
    samples = build_samples(num_prompts=7, num_samples=3)
    shares = split_for_ranks(samples, num_mini_batches=3, num_ranks=2)
    assert [len(share) for share in shares] == [3, 3]
    prompts = []
    for i in range(3):
        mini_batch = sorted(sample_id for share in shares for sample_id in ids(share[i]))
        prompts.append(sorted({sample_id.split("/")[0] for sample_id in mini_batch}))
        assert mini_batch == sorted(f"{p}/{j}" for p in prompts[-1] for j in range(3))
    assert prompts == [["p0", "p1"], ["p2", "p3"], ["p4", "p5", "p6"]]


def test_the_split_is_deterministic_and_complete():
    samples = build_samples(num_prompts=5)
    first, second = (split_for_ranks(samples, 2, 3) for _ in range(2))
    assert first == second
    assert sorted(i for share in first for part in share for i in ids(part)) == sorted(ids(samples))


def test_tokens_are_balanced_over_ranks():
    samples = build_samples(num_prompts=30, num_samples=8)
    tokens = [sum(len(s.token_ids) for part in share for s in part) for share in split_for_ranks(samples, 1, 4)]
    assert max(tokens) - min(tokens) <= max(len(s.token_ids) for s in samples)


def test_fewer_prompts_than_mini_batches_make_fewer_mini_batches():
    samples = [build_sample([3, 4], 1, sample_id=f"p{i}/0") for i in range(2)]
    assert [len(share) for share in split_for_ranks(samples, 5, 3)] == [2, 2, 2]


def test_no_samples_are_an_error():
    with pytest.raises(ValueError, match="no samples"):
        split_for_ranks([], 1, 1)
