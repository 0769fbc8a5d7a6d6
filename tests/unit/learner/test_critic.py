"""The critic on one rank: targets and gradient against slow loops in float64, its warm-up, guards and checkpoints."""

import math
import statistics

import pytest
import torch
from learner_cases import PPO, build_learner, build_model, build_samples, captured_gradients, weights_of

from qurl.config import AlgorithmConfig, CriticConfig, LearnerDtype
from qurl.errors import NonFiniteLoss
from qurl.observability.metrics import reduce_metrics

SAMPLES = build_samples()
CRITIC = CriticConfig(learning_rate=1e-2, value_clip=0.2)


def metrics_of(result):
    return reduce_metrics(result.reports)


def critic_weights(learner):
    return {name: tensor.detach().clone() for name, tensor in learner._critic.engine.module.named_parameters()}


def set_values_apart(learner):
    """A head that tells states apart; it begins with zeros."""
    with torch.no_grad():
        learner._critic.engine.module.head.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(3))


class SlowCritic:
    """The learner's critic in float64, one sequence at a time."""

    def __init__(self, learner):
        self.decoder = build_model(tie_word_embeddings=True).double().base_model
        weights = critic_weights(learner)
        self.decoder.load_state_dict({k.removeprefix("decoder."): v for k, v in weights.items() if k.startswith("decoder.")})
        self.weight, self.bias = (weights[f"head.{name}"].double().requires_grad_() for name in ("weight", "bias"))

    def values(self, sample):
        """One per trained token, of what stands before it."""
        hidden = self.decoder(torch.tensor([sample.token_ids])).last_hidden_state[0]
        trained = [t for t, is_trained in enumerate(sample.loss_mask) if is_trained]
        return [(self.weight[0] * hidden[t - 1]).sum() + self.bias[0] for t in trained]

    def gradients(self):
        found = {f"critic.decoder.{name}": p.grad for name, p in self.decoder.named_parameters()}
        return found | {"critic.head.weight": self.weight.grad, "critic.head.bias": self.bias.grad}


def token_penalties(model, initial, sample):
    """k1 estimates at the trained tokens."""

    def logprobs(m):
        rows = m(torch.tensor([sample.token_ids])).logits[0].log_softmax(-1)
        return [rows[t - 1, token] for t, token in enumerate(sample.token_ids) if sample.loss_mask[t]]

    with torch.no_grad():
        return [(a - b).item() for a, b in zip(logprobs(model), logprobs(initial), strict=True)]


def slow_targets(old_values, penalties, reward):
    """(advantages before whitening, returns) of one response by the definition: a sum over all later tokens."""
    size, discount, lam = len(old_values), PPO.advantage.discount, PPO.advantage.gae_lambda
    rewards = [-PPO.kl.coefficient * penalty for penalty in penalties]
    rewards[-1] += reward
    following = [*old_values[1:], 0.0]
    deltas = [rewards[t] + discount * following[t] - old_values[t] for t in range(size)]
    advantages = [sum((discount * lam) ** (k - t) * deltas[k] for k in range(t, size)) for t in range(size)]
    return advantages, [a + v for a, v in zip(advantages, old_values, strict=True)]


@pytest.mark.parametrize("budget", [10_000, 64, 1])
def test_targets_and_gradients_equal_a_slow_loop_whatever_the_packing(model_folder, budget, monkeypatch):
    learner = build_learner(model_folder, algorithm=PPO, critic=CRITIC, max_tokens_per_micro_batch=budget)
    learner.train_step([build_samples(seed=1)])  # away from the reference
    set_values_apart(learner)
    slow, (policy, initial) = SlowCritic(learner), (build_model(tie_word_embeddings=True).double() for _ in range(2))
    policy.load_state_dict(weights_of(learner), strict=False)
    batches, loss_of = [], learner._policy_loss
    monkeypatch.setattr(learner, "_policy_loss", lambda step, i: batches.append(step.batches[i]) or loss_of(step, i))
    with captured_gradients(learner) as found:
        metrics = metrics_of(learner.train_step([SAMPLES]))

    old_values = [slow.values(sample) for sample in SAMPLES]
    targets = [
        slow_targets([v.item() for v in values], token_penalties(policy, initial, sample), sample.reward)
        for values, sample in zip(old_values, SAMPLES, strict=True)
    ]
    raw = [a for advantages, _ in targets for a in advantages]
    returns = [r for _, of_sample in targets for r in of_sample]
    mean, std = statistics.mean(raw), math.sqrt(statistics.variance(raw) + 1e-8)
    assert sorted(index for batch in batches for index in batch.sample_indices) == list(range(len(SAMPLES)))
    for batch in batches:  # what the policy loss was given
        for segment, index in enumerate(batch.sample_indices):
            given = batch.advantages[(batch.segment_ids == segment) & batch.loss_mask].tolist()
            assert given == pytest.approx([(a - mean) / std for a in targets[index][0]], rel=1e-4, abs=1e-4)
    explained = 1 - statistics.variance(raw) / statistics.variance(returns)
    assert metrics["critic/explained_variance"] == pytest.approx(explained, rel=1e-3)
    assert metrics["critic/value_mean"] == pytest.approx(statistics.mean(v.item() for vs in old_values for v in vs), rel=1e-4)

    flat_values = [v for values in old_values for v in values]
    loss = sum(0.5 * (v - r) ** 2 for v, r in zip(flat_values, returns, strict=True)) / len(returns)
    loss.backward()
    assert metrics["critic/loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, expected in slow.gradients().items():
        bound = 1e-4 * expected.abs().max().item()  # float32 forward and backward, of float32 returns
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=bound, msg=name)


def test_the_loss_falls_on_a_fixed_batch_and_the_critic_explains_it(model_folder):
    learner = build_learner(model_folder, algorithm=AlgorithmConfig(advantage=PPO.advantage), critic=CRITIC)
    found = [metrics_of(learner.train_step([SAMPLES], None, False)) for _ in range(20)]
    assert found[-1]["critic/loss"] < 0.1 * found[0]["critic/loss"]
    assert found[0]["critic/value_mean"] == found[0]["critic/explained_variance"] == 0.0
    assert found[-1]["critic/explained_variance"] > 0.8


def test_while_the_critic_warms_up_the_policy_stays(model_folder):
    learner = build_learner(model_folder, algorithm=PPO, critic=CRITIC)
    start = weights_of(learner)
    metrics = metrics_of(learner.train_step([SAMPLES[:6], SAMPLES[6:]], None, False))
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights_of(learner).items())
    assert metrics["policy/num_optimizer_steps"] == 0 and "policy/loss" not in metrics and metrics["critic/grad_norm"] > 0
    assert metrics["critic/learning_rate"] == 1e-2
    assert metrics_of(learner.train_step([SAMPLES]))["policy/learning_rate"] == 1e-3
    assert not torch.equal(weights_of(learner)["model.norm.weight"], start["model.norm.weight"])


@pytest.mark.parametrize("clip", [1e-3, None])
def test_values_that_moved_too_far_have_no_gradient(model_folder, clip):
    learner = build_learner(model_folder, algorithm=PPO, critic=CriticConfig(learning_rate=1e-2, value_clip=clip))
    metrics = metrics_of(learner.train_step([SAMPLES[:6], SAMPLES[6:]], None, False))
    if clip is None:
        assert metrics["critic/clip_fraction"] == 0.0
    else:
        assert metrics["critic/clip_fraction"] > 0.2  # in the second mini-batch, after a step of 1e-2


@pytest.mark.parametrize("zero_stage, dtype", [(0, LearnerDtype.float32), (2, LearnerDtype.bfloat16), (3, LearnerDtype.bfloat16)])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(model_folder, tmp_path, zero_stage, dtype):
    settings = {"algorithm": PPO, "critic": CRITIC, "zero_stage": zero_stage, "dtype": dtype, "warmup_steps": 7}
    batches = [([SAMPLES[:6], SAMPLES[6:]], False), ([build_samples(seed=1)], True), ([SAMPLES], True)]
    unbroken, first = (build_learner(model_folder, **settings) for _ in range(2))
    expected = [metrics_of(unbroken.train_step(batch, None, trains_policy)) for batch, trains_policy in batches]
    found = [metrics_of(first.train_step(batch, None, trains_policy)) for batch, trains_policy in batches[:2]]
    first.save_checkpoint(tmp_path)
    resumed = build_learner(model_folder, **settings)
    resumed.load_checkpoint(tmp_path)
    found += [metrics_of(resumed.train_step(batch, None, trains_policy)) for batch, trains_policy in batches[2:]]
    assert found == expected
    for weights in (weights_of, critic_weights):
        assert all(torch.equal(tensor, weights(unbroken)[name]) for name, tensor in weights(resumed).items())


def test_a_checkpoint_without_a_critic_is_refused_where_there_is_one(model_folder, tmp_path):
    build_learner(model_folder).save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"this run has .*'algorithm.advantage.name': 'gae'.*set them alike"):
        build_learner(model_folder, algorithm=PPO, critic=CRITIC).load_checkpoint(tmp_path)


def test_a_critic_that_is_not_finite_stops_the_run_before_policy_and_critic_move(model_folder, tmp_path):
    learner = build_learner(model_folder, algorithm=PPO, critic=CRITIC)
    start = weights_of(learner), critic_weights(learner)
    learner._critic.engine.module.head.bias.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFiniteLoss, match="critic's optimizer step 0, rank 0: gradient is not finite"):
        learner.train_step([SAMPLES], tmp_path)
    assert (tmp_path / "nonfinite_rank0.json").exists()
    for before, after in zip(start, (weights_of(learner), critic_weights(learner)), strict=True):
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    with torch.no_grad():
        learner._critic.engine.module.head.bias.fill_(math.inf)
    with pytest.raises(NonFiniteLoss, match=f"values or KL penalties are not finite .*{len(SAMPLES)} samples") as failure:
        learner.train_step([SAMPLES])
    assert sorted(failure.value.sample_ids) == sorted(sample.sample_id for sample in SAMPLES)


def test_invariant_scaling_and_the_multiplier_are_the_policys_alone(model_folder):
    learner = build_learner(model_folder, algorithm=PPO, critic=CRITIC, scaled_layers_multiplier=2.0)
    assert {group["lr"] for group in learner._critic.engine.optimizer.param_groups} == {1e-2}
