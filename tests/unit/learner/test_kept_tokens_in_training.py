"""Renormalizing over the tokens that top-p and top-k left: values, gradients, packing, and what a whole iteration makes of it."""

import json
from dataclasses import replace

import pytest
import torch
from learner_cases import EVERYTHING, VOCAB, build_learner, build_model, build_samples, weights_of, with_kept_tokens

import qurl.learner.scored_head
from qurl.kept_tokens import unpack_sets
from qurl.learner.packing import pack
from qurl.learner.policy import Policy

TEMPERATURE = 1.3


def scores(policy, batch):
    return policy(batch.input_ids, batch.position_ids, batch.loss_mask, batch.kept_tokens)


def gradients(policy, batch, entropy_coefficient=0.3):
    policy.zero_grad()
    logprobs, entropy = scores(policy, batch)
    (logprobs * batch.advantages + entropy_coefficient * entropy).sum().backward()
    return logprobs.detach(), entropy.detach(), {name: p.grad.clone() for name, p in policy.named_parameters()}


def reference(model, batch, entropy_coefficient=0.3):
    """The same from transformers' logits in float64, one sequence and one token after the other."""
    model = model.double()
    model.zero_grad()
    sets = unpack_sets(batch.kept_tokens)
    logprobs, entropy = (torch.zeros(batch.loss_mask.shape, dtype=torch.float64) for _ in range(2))
    for row, segment in sorted({(row, s) for row, ids in enumerate(batch.segment_ids.tolist()) for s in ids if s >= 0}):
        [where] = (batch.segment_ids[row] == segment).nonzero(as_tuple=True)
        ids = batch.input_ids[row, where]
        logits = model(input_ids=ids[None]).logits[0] / TEMPERATURE
        for position in range(len(ids)):
            if batch.loss_mask[row, where[position]]:
                kept = torch.from_numpy(next(sets)).long()
                log_probs = logits[position - 1, kept].log_softmax(0)
                logprobs[row, where[position]] = log_probs[kept == ids[position]].squeeze()
                entropy[row, where[position]] = -(log_probs.exp() * log_probs).sum()
    (logprobs * batch.advantages + entropy_coefficient * entropy).sum().backward()
    assert next(sets, None) is None
    return logprobs.detach(), entropy.detach(), {f"model.{name}": p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("chunk", [7, 4096])
def test_logprobs_entropies_and_gradients_are_those_of_a_loop_in_float64(monkeypatch, chunk):
    monkeypatch.setattr(qurl.learner.scored_head, "LOGIT_BYTES", chunk * VOCAB * 4)
    [batch] = pack(with_kept_tokens(build_samples()), 4096)
    found = gradients(Policy(build_model(), temperature=TEMPERATURE, entropy_gradient=True), batch)
    expected = reference(build_model(), batch)
    for actual, wanted in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=2e-5)  # float32 logits of up to 30
    assert found[2].keys() >= expected[2].keys()
    for name, gradient in expected[2].items():
        size = gradient.abs().max().clamp(min=1e-3).item()
        torch.testing.assert_close(found[2][name].double(), gradient, rtol=1e-4, atol=1e-4 * size, msg=name)


def test_sets_that_are_the_whole_vocabulary_change_no_bit():
    samples = build_samples()
    [whole], [none] = pack(with_kept_tokens(samples, sizes=(VOCAB,)), 4096), pack(samples, 4096)
    policy = Policy(build_model(), temperature=TEMPERATURE, entropy_gradient=True)
    (*found, grads), (*expected, wanted) = gradients(policy, whole), gradients(policy, none)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(grads[name], wanted[name]) for name in wanted)


def test_a_set_of_one_token_has_probability_one_and_no_gradient():
    [batch] = pack(with_kept_tokens(build_samples(), sizes=(1,)), 4096)
    logprobs, entropy, grads = gradients(Policy(build_model(), temperature=TEMPERATURE, entropy_gradient=True), batch)
    assert not logprobs.any() and not entropy.any()
    assert all(not gradient.any() for gradient in grads.values())


def test_a_set_that_the_learner_finds_all_but_impossible_stays_finite():
    model = build_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[:50] += 1e4  # the tokens of no set outweigh all others by thousands of nats, or are outweighed
    samples = build_samples()
    [batch] = pack(with_kept_tokens(samples, sizes=(2, 7)), 4096)
    logprobs, entropy, grads = gradients(Policy(model, temperature=TEMPERATURE, entropy_gradient=True), batch)
    assert logprobs.isfinite().all() and entropy.isfinite().all() and (entropy >= 0).all()
    assert all(gradient.isfinite().all() for gradient in grads.values())


@pytest.mark.parametrize("max_tokens", [40, 100, 4096])
def test_sets_stay_with_their_tokens_however_samples_are_packed(max_tokens):
    samples = with_kept_tokens(build_samples())
    policy = Policy(build_model(), temperature=TEMPERATURE)

    def by_sample(batches):
        found = {}
        for batch in batches:
            logprobs = scores(policy, batch)[0].detach()
            for segment, index in enumerate(batch.sample_indices):
                found[index] = logprobs[(batch.segment_ids == segment) & batch.loss_mask]
        return [found[index] for index in sorted(found)]

    alone = [by_sample(pack([sample], 4096))[0] for sample in samples]
    for found, expected in zip(by_sample(pack(samples, max_tokens)), alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)  # matrix products of other sizes


def test_samples_with_and_without_sets_and_sets_that_do_not_fit_are_refused():
    first, second = build_samples(1, 2)
    [kept] = with_kept_tokens([first])
    with pytest.raises(ValueError, match="all or none"):
        pack([kept, second], 4096)
    with pytest.raises(ValueError, match=rf"{first.sample_id}.*sets of kept tokens for 1 trained"):
        pack([replace(kept, loss_mask=[*[False] * (len(kept.token_ids) - 1), True])], 4096)


def test_micro_batches_change_no_update_that_renormalizes(tmp_path):
    """Old and reference logprobs, both KL terms, entropy, normalized weights: everything sees the same sets."""
    build_model().save_pretrained(tmp_path)
    samples = with_kept_tokens(build_samples())
    found = []
    for max_tokens in (4096, 60):
        learner = build_learner(
            tmp_path, algorithm=EVERYTHING, max_tokens_per_micro_batch=max_tokens, temperature=TEMPERATURE, num_mini_batches=1
        )
        learner.train_step([samples])
        found.append(weights_of(learner))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=2e-5)  # Adam divides sums of another order
    start = build_model().state_dict()
    assert any((found[0][name] - start[name]).abs().max() > 1e-4 for name in found[0] if name in start)


def test_the_samples_of_a_failing_step_are_written_with_their_sets(tmp_path):
    from qurl.learner.learner import _as_json

    [sample] = with_kept_tokens(build_samples(1, 1))
    written = json.loads(json.dumps(_as_json(sample)))
    assert written["kept_tokens"] == [ids.tolist() for ids in unpack_sets(sample.kept_tokens)]
    assert json.loads(json.dumps(_as_json(replace(sample, kept_tokens=None))))["kept_tokens"] is None
