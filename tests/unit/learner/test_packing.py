"""Packing: bounds, completeness, and that packed sequences do not see each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_cases import FAMILIES, build_model, build_sample, build_samples

from qurl.learner.packing import empty_micro_batch, pack, padding_fraction
from qurl.learner.policy import Policy


def unpack(batches, num_samples):
    """(token ids, loss mask, positions) of each sample, read back from the packed tensors."""
    found = {}
    for batch in batches:
        for segment, index in enumerate(batch.sample_indices):
            where = batch.segment_ids == segment
            assert len(set(where.nonzero()[:, 0].tolist())) == 1, "a sequence must lie in one row"
            assert index not in found
            found[index] = tuple(t[where].tolist() for t in (batch.input_ids, batch.loss_mask, batch.position_ids))
    return [found[i] for i in range(num_samples)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(1, 120))
def test_every_sample_is_packed_once_within_the_budget(lengths, max_tokens):
    samples = [build_sample(range(10, 10 + n), 1) for n in lengths]
    batches = pack(samples, max_tokens)
    for sample, (ids, mask, positions) in zip(samples, unpack(batches, len(samples)), strict=True):
        assert (ids, mask) == (sample.token_ids, sample.loss_mask)
        assert positions == list(range(len(ids)))
    for batch in batches:
        rows, length = batch.input_ids.shape
        assert rows * length <= max_tokens or (rows == 1 and len(batch.sample_indices) == 1)
        assert not batch.loss_mask[batch.segment_ids < 0].any()


def test_short_sequences_share_rows_so_that_padding_is_small():
    samples = build_samples(num_prompts=40, num_samples=8)
    batches = pack(samples, 256)
    assert padding_fraction(batches) < 0.05  # one sequence per row would pad about half


def test_a_sample_over_the_budget_gets_its_own_micro_batch():
    samples = [build_sample(range(5), 1), build_sample(range(50), 1), build_sample(range(5), 1)]
    batches = pack(samples, 16)
    assert [batch.sample_indices for batch in batches] == [[1], [0, 2]]


@pytest.mark.parametrize("change, message", [
    ({"loss_mask": [True, True]}, "precedes"), ({"advantages": [0.0]}, "equally long"),
])
def test_a_malformed_sample_is_refused_by_name(change, message):
    import dataclasses

    sample = dataclasses.replace(build_sample([4, 5], 1, sample_id="p7/1"), **change)
    with pytest.raises(ValueError, match=f"p7/1.*{message}"):
        pack([sample], 16)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*FAMILIES, "sliding"])
def test_packed_logprobs_equal_those_of_sequences_alone(family, attention):
    overrides = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1} if family == "sliding" else {}
    model = build_model("qwen2" if family == "sliding" else family, attn_implementation=attention, **overrides)
    policy = Policy(model, temperature=0.7)
    samples = build_samples(num_prompts=5, num_samples=4)
    for batch in pack(samples, 96):
        with torch.no_grad():
            logprobs, entropy = policy(batch.input_ids, batch.position_ids, batch.loss_mask)
        assert not logprobs[~batch.loss_mask].any() and not entropy[~batch.loss_mask].any()
        for segment, index in enumerate(batch.sample_indices):
            with torch.no_grad():
                logits = model(torch.tensor([samples[index].token_ids])).logits[0].double() / 0.7
            log_probs = logits.log_softmax(-1)
            where = (batch.segment_ids == segment) & batch.loss_mask
            positions = batch.position_ids[where]
            expected = log_probs[positions - 1, batch.input_ids[where]]
            expected_entropy = -(log_probs.exp() * log_probs).sum(-1)[positions - 1]
            # float32 against float64 over logits of size 10
            torch.testing.assert_close(logprobs[where].double(), expected, rtol=0, atol=2e-5)
            torch.testing.assert_close(entropy[where].double(), expected_entropy, rtol=0, atol=2e-5)


def test_an_empty_micro_batch_reaches_every_weight_with_a_zero_gradient():
    policy = Policy(build_model(), temperature=1.0)
    batch = empty_micro_batch()
    logprobs, _ = policy(batch.input_ids, batch.position_ids, batch.loss_mask)
    logprobs.sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
