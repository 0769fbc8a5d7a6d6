"""The logprob forward: chunked output layer, checkpointing, refusals."""

import pytest
import torch
from learner_cases import build_model, build_samples

import qurl.learner.scored_head
from qurl.learner.packing import pack
from qurl.learner.policy import Policy
from qurl.learner.scored_head import ScoredHead


def gradients(policy, batch, entropy_coefficient=0.0):
    policy.zero_grad()
    logprobs, entropy = policy(batch.input_ids, batch.position_ids, batch.loss_mask)
    (logprobs * batch.advantages + entropy_coefficient * entropy).sum().backward()
    return logprobs.detach(), {name: p.grad.clone() for name, p in policy.named_parameters()}


@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.3])
@pytest.mark.parametrize("tied", [True, False])
def test_chunks_with_recomputation_change_nothing(monkeypatch, tied, entropy_coefficient):
    policy = Policy(build_model(tie_word_embeddings=tied), temperature=1.3, entropy_gradient=bool(entropy_coefficient))
    [batch] = pack(build_samples(), 4096)
    whole = gradients(policy, batch, entropy_coefficient)
    monkeypatch.setattr(qurl.learner.scored_head, "LOGIT_BYTES", 7 * 300 * 4)  # 7 tokens per chunk
    chunked = gradients(policy, batch, entropy_coefficient)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)  # sums of a weight's gradient in another order


def slow_gradients(head, hidden, targets, temperature, worth):
    """Of sum(worth[0] * logprob + worth[1] * entropy), by autograd over all logits at once, in float64."""
    weight, bias, hidden = (x.detach().double().requires_grad_() for x in (head.weight, head.bias, hidden))
    z = torch.log_softmax((hidden @ weight.T + bias) / temperature, dim=-1)
    logprobs, entropy = z.gather(1, targets[:, None])[:, 0], -(z.exp() * z).sum(-1)
    (worth[0] * logprobs + worth[1] * entropy).sum().backward()
    return logprobs, entropy, weight.grad, bias.grad, hidden.grad


@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])  # bfloat16: half a unit is 4e-3
@pytest.mark.parametrize("count", [0, 3, 29])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_a_head_with_a_bias_equals_float64_over_all_logits(monkeypatch, dtype, relative, count, entropy_gradient):
    monkeypatch.setattr(qurl.learner.scored_head, "LOGIT_BYTES", 7 * 50 * 4)  # 7 tokens per chunk
    torch.manual_seed(3)
    head = torch.nn.Linear(16, 50).to(dtype)
    hidden = torch.randn(count, 16).to(dtype).requires_grad_()
    targets, worth = torch.randint(50, (count,)), torch.randn(2, count)
    scored = ScoredHead(head, temperature=0.7, entropy_gradient=entropy_gradient)
    logprobs, entropy = scored(hidden, targets)
    (worth[0] * logprobs + (worth[1] * entropy if entropy_gradient else 0)).sum().backward()
    expected = slow_gradients(head, hidden, targets, 0.7, worth * torch.tensor([[1.0], [float(entropy_gradient)]]))
    assert head.weight.grad.dtype == dtype and logprobs.dtype == torch.float32
    for found, wanted in zip((logprobs, entropy, head.weight.grad, head.bias.grad, hidden.grad), expected, strict=True):
        assert (found.double() - wanted).norm() <= relative * wanted.norm()


def test_a_weights_gradient_is_summed_over_chunks_in_float32(monkeypatch):
    head = torch.nn.Linear(4, 10, bias=False).to(torch.bfloat16)
    hidden, targets = torch.ones(2000, 4, dtype=torch.bfloat16), torch.zeros(2000, dtype=torch.int64)
    torch.nn.init.zeros_(head.weight)
    monkeypatch.setattr(qurl.learner.scored_head, "LOGIT_BYTES", 10 * 4)  # one token per chunk: 2000 summands of 0.9
    ScoredHead(head, temperature=1.0, entropy_gradient=False)(hidden, targets)[0].sum().backward()
    torch.testing.assert_close(head.weight.grad[0].float(), torch.full((4,), 1800.0), rtol=2**-7, atol=0)  # bfloat16 stops at 256


def test_checkpoints_hold_the_output_layer_once():
    names = Policy(build_model(tie_word_embeddings=False), temperature=1.0).state_dict().keys()
    assert "model.lm_head.weight" in names and not any(name.startswith("head.") for name in names)


def test_only_where_asked_for_does_the_entropy_have_a_gradient():
    [batch] = pack(build_samples(), 4096)
    for asked in (False, True):
        policy = Policy(build_model(), temperature=1.0, entropy_gradient=asked)
        assert policy(batch.input_ids, batch.position_ids, batch.loss_mask)[1].requires_grad is asked


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_no_tensor_of_all_logits_is_kept(monkeypatch, entropy_gradient):
    policy = Policy(build_model(), temperature=1.0, entropy_gradient=entropy_gradient)
    [batch] = pack(build_samples(num_prompts=8), 4096)
    monkeypatch.setattr(qurl.learner.scored_head, "LOGIT_BYTES", 16 * 300 * 4)
    largest = 0

    def note(tensor):
        nonlocal largest
        if tensor.shape[-1:] == (300,):
            largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        policy(batch.input_ids, batch.position_ids, batch.loss_mask)
    assert largest == 0, "logits of a chunk must not outlive its forward"


def test_activation_checkpointing_recomputes_layers_and_changes_nothing():
    [batch] = pack(build_samples(), 4096)
    plain = gradients(Policy(build_model(), temperature=1.0), batch)
    policy = Policy(build_model(), temperature=1.0, activation_checkpointing=True)
    calls = []
    policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpointed = gradients(policy, batch)
    assert len(calls) == 2, "once in forward, once more in backward"
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-6)  # the same operations, run again


def test_dropout_is_off_with_and_without_checkpointing():
    [batch] = pack(build_samples(), 4096)
    for checkpointing in (False, True):
        policy = Policy(build_model(attention_dropout=0.5), temperature=1.0, activation_checkpointing=checkpointing)
        assert torch.equal(gradients(policy, batch)[0], gradients(policy, batch)[0])


def test_a_temperature_that_cannot_be_trained_on_is_refused():
    with pytest.raises(ValueError, match=r"rollout\.temperature=0"):
        Policy(build_model(), temperature=0.0)


def test_a_model_that_changes_logits_after_its_output_layer_is_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, final_logit_softcapping=0.05,
    )
    with pytest.raises(ValueError, match="output layer"):
        Policy(Gemma2ForCausalLM(config), temperature=1.0)
