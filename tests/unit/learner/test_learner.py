"""One rank: the gradient against a slow loop, old and reference policies, masters, guards, checkpoints, export."""

import dataclasses
import json
import math
import statistics

import pytest
import torch
from learner_cases import EVERYTHING, build_learner, build_model, build_sample, build_samples, captured_gradients, weights_of
from transformers import AutoModelForCausalLM

from qurl.config import (
    Aggregation,
    AlgorithmConfig,
    CorrectionConfig,
    KLConfig,
    KLEstimator,
    LearnerDtype,
    PolicyLossConfig,
    QuantizationConfig,
    Rejection,
    UpdateAwareness,
)
from qurl.errors import NonFiniteLoss
from qurl.observability.metrics import reduce_metrics

SAMPLES = build_samples()
STAGES_AND_DTYPES = [(0, LearnerDtype.float32), (1, LearnerDtype.bfloat16), (2, LearnerDtype.float32), (3, LearnerDtype.bfloat16)]


def metrics_of(result):
    return reduce_metrics(result.reports)


def token_logprobs(model, sample, temperature=1.0):
    """[T] float64 logprobs of one sequence alone; 0 at the first token."""
    logits = model(torch.tensor([sample.token_ids])).logits[0] / temperature
    picked = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(sample.token_ids[1:])[:, None])[:, 0]
    return torch.cat([picked.new_zeros(1), picked])


def token_entropies(model, sample, temperature=1.0):
    """[T] float64 entropies of what each token was drawn from; 0 at the first token."""
    log_probs = (model(torch.tensor([sample.token_ids])).logits[0] / temperature).log_softmax(-1)[:-1]
    return torch.cat([log_probs.new_zeros(1), -(log_probs.exp() * log_probs).sum(-1)])


def slow_gradients(model, samples, algorithm, temperature, advantages=None):
    """Gradients of tis or sequence_tis at old = current weights, token by token in float64.

    There the ratio is 1, nothing is clipped, and the gradient of ratio * A is A times that of the logprob, for gspo too."""
    correction, config = algorithm.correction, algorithm.policy_loss
    lengths = [sum(s.loss_mask) for s in samples]
    scales = {
        Aggregation.token_mean: lambda length: 1 / sum(lengths),
        Aggregation.sequence_mean: lambda length: 1 / (len(samples) * length),
        Aggregation.constant: lambda length: 1 / (len(samples) * config.aggregation_constant),
    }
    terms, weights, bonus = [], [], torch.zeros((), dtype=torch.float64)
    for i, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        logprobs, entropies = token_logprobs(model, sample, temperature), token_entropies(model, sample, temperature)
        log_rhos = [logprobs[t].item() - sample.rollout_logprobs[t] for t, is_trained in enumerate(sample.loss_mask) if is_trained]
        mean = math.exp(sum(log_rhos) / length)
        low, high = correction.rejection_bounds
        if correction.rejection is Rejection.geometric and not low <= mean <= high:
            continue
        for t, is_trained in enumerate(sample.loss_mask):
            if is_trained:
                of_token = logprobs[t].item() - sample.rollout_logprobs[t]
                rho = math.exp(sum(log_rhos) if correction.name == "sequence_tis" else of_token)
                worth = sample.advantages[t] if advantages is None else advantages[i]
                scale = scales[config.aggregation](length)
                weights.append(min(rho, correction.truncation))
                terms.append(scale * weights[-1] * worth * torch.exp(logprobs[t] - logprobs[t].detach()))
                bonus = bonus + scale * entropies[t]
    mean_weight = sum(weights) / len(weights) if correction.normalize_weights else 1.0
    (-sum(terms) / mean_weight - algorithm.entropy_coefficient * bonus).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(found, expected, relative=2e-5):
    """relative to the largest entry of the same weight; the default is that of float32 forward and backward."""
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        bound = relative * expected[name].abs().max().item()
        torch.testing.assert_close(gradient.double(), expected[name], rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("aggregation", Aggregation)
@pytest.mark.parametrize("budget", [10_000, 64, 1])
def test_the_gradient_equals_a_token_by_token_loop_whatever_the_packing(model_folder, aggregation, budget):
    constant = 24 if aggregation is Aggregation.constant else None
    algorithm = AlgorithmConfig(
        correction=CorrectionConfig(name="tis", truncation=1.5),
        policy_loss=PolicyLossConfig(aggregation=aggregation, aggregation_constant=constant),
    )
    learner = build_learner(model_folder, algorithm=algorithm, temperature=0.8, max_tokens_per_micro_batch=budget)
    with captured_gradients(learner) as found:
        learner.train_step([SAMPLES])
    reference = build_model(tie_word_embeddings=True).double()
    assert_same_gradients(found, slow_gradients(reference, SAMPLES, algorithm, 0.8))


def slow_penalized_advantages(model, initial, samples, coefficient):
    """reinforce_plus_plus_baseline of rewards less the k1 estimate of KL(old || initial), summed over each response."""
    with torch.no_grad():
        log_ratios = [token_logprobs(model, s, 0.8) - token_logprobs(initial, s, 0.8) for s in samples]
    penalties = [x[torch.tensor(s.loss_mask)].sum().item() for x, s in zip(log_ratios, samples, strict=True)]
    rewards = [s.reward - coefficient * penalty for s, penalty in zip(samples, penalties, strict=True)]
    prompts = [s.sample_id.rpartition("/")[0] for s in samples]
    centered = [
        r - statistics.mean(other for other, p in zip(rewards, prompts, strict=True) if p == prompt)
        for r, prompt in zip(rewards, prompts, strict=True)
    ]
    tokens = [c for c, s in zip(centered, samples, strict=True) for _ in range(sum(s.loss_mask))]
    mean, std = statistics.mean(tokens), math.sqrt(statistics.variance(tokens) + 1e-8)
    return [(c - mean) / std for c in centered], sum(penalties) / len(tokens)


@pytest.mark.parametrize("budget", [10_000, 64])
def test_what_looks_at_sequences_mini_batches_and_iterations_equals_a_slow_loop_too(model_folder, budget):
    learner = build_learner(model_folder, algorithm=EVERYTHING, temperature=0.8, max_tokens_per_micro_batch=budget)
    learner.train_step([build_samples(seed=1)])
    moved, initial = (build_model(tie_word_embeddings=True).double() for _ in range(2))
    moved.load_state_dict(weights_of(learner), strict=False)
    with captured_gradients(learner) as found:
        metrics = metrics_of(learner.train_step([SAMPLES]))
    advantages, kl = slow_penalized_advantages(moved, initial, SAMPLES, EVERYTHING.kl.coefficient)
    # sums of float32 logprobs over a response, in an exponent and in rewards that differ by little
    assert_same_gradients(found, slow_gradients(moved, SAMPLES, EVERYTHING, 0.8, advantages), relative=3e-4)
    assert metrics["policy/kl_reward"] == pytest.approx(kl, rel=1e-3) and abs(kl) > 1e-3
    assert 0 < metrics["mismatch/rejected_fraction"] < 1


def test_a_penalty_in_the_reward_that_is_not_finite_stops_the_step(model_folder):
    learner = build_learner(model_folder, algorithm=EVERYTHING)
    with torch.no_grad():
        learner.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match=r"KL penalty is not finite in 12 samples"):
        learner.train_step([SAMPLES])


def test_old_logprobs_are_those_of_the_weights_at_entry(model_folder):
    half = len(SAMPLES) // 2
    together = metrics_of(build_learner(model_folder, learning_rate=0.1).train_step([SAMPLES]))
    apart = metrics_of(build_learner(model_folder, learning_rate=0.1).train_step([SAMPLES[:half], SAMPLES[half:]]))
    for key in ("mismatch/kl_rollout_old", "mismatch/abs_logprob_diff", "mismatch/ratio_max"):
        assert apart[key] == pytest.approx(together[key], rel=1e-4), key  # float32 logprobs from other packings
    assert together["policy/kl_old_current"] == 0.0
    assert apart["policy/kl_old_current"] > 1e-3
    assert apart["policy/num_optimizer_steps"] == 2


@pytest.mark.parametrize("estimator", KLEstimator)
def test_the_kl_term_measures_the_distance_to_the_initial_policy(model_folder, estimator):
    algorithm = AlgorithmConfig(kl=KLConfig(coefficient=0.1, estimator=estimator))
    learner = build_learner(model_folder, algorithm=algorithm)
    assert metrics_of(learner.train_step([SAMPLES]))["policy/kl_loss"] == pytest.approx(0.0, abs=1e-6)
    moved, initial = (build_model(tie_word_embeddings=True).double() for _ in range(2))
    moved.load_state_dict(weights_of(learner), strict=False)
    with torch.no_grad():
        log_ratios = torch.cat([
            (token_logprobs(moved, s) - token_logprobs(initial, s))[torch.tensor(s.loss_mask)] for s in SAMPLES
        ])
    estimates = {
        KLEstimator.k1: log_ratios, KLEstimator.k2: 0.5 * log_ratios**2, KLEstimator.k3: torch.exp(-log_ratios) - 1 + log_ratios,
    }
    found = metrics_of(learner.train_step([SAMPLES]))["policy/kl_loss"]
    assert found == pytest.approx(estimates[estimator].mean().item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_kl_penalty_holds_the_policy_back(model_folder, zero_stage):
    drift = []
    for coefficient in (1e-6, 10.0):
        algorithm = AlgorithmConfig(kl=KLConfig(coefficient=coefficient))
        learner = build_learner(model_folder, algorithm=algorithm, zero_stage=zero_stage)
        for _ in range(4):
            drift.append(metrics_of(learner.train_step([SAMPLES]))["policy/kl_loss"])
    assert drift[7] < 0.5 * drift[3]


def test_a_rewarded_response_becomes_likely_and_a_punished_one_unlikely(model_folder):
    good = build_sample([5, 6, 7, 8, 9], 2, sample_id="p0/0", advantage=1.0)
    bad = build_sample([5, 6, 10, 11, 12], 2, sample_id="p0/1", advantage=-1.0)
    algorithm = AlgorithmConfig(correction=CorrectionConfig(name="none"))
    learner = build_learner(model_folder, algorithm=algorithm)

    def logprobs():
        model = build_model(tie_word_embeddings=True)
        model.load_state_dict(weights_of(learner), strict=False)
        with torch.no_grad():
            return [token_logprobs(model, sample)[2:].sum().item() for sample in (good, bad)]

    before = logprobs()
    for _ in range(20):
        learner.train_step([[good, bad]])
    after = logprobs()
    assert after[0] > before[0] + 1.0 and after[1] < before[1] - 1.0


@pytest.mark.parametrize("zero_stage", range(4))
def test_bfloat16_masters_hold_the_unrounded_weights(model_folder, zero_stage):
    from deepspeed.utils import safe_get_full_fp32_param

    quantization = QuantizationConfig(update_awareness=UpdateAwareness.invariant_scaling, invariant_scale=1.5)
    settings = {"dtype": LearnerDtype.bfloat16, "zero_stage": zero_stage, "learning_rate": 1e-6}
    learner = build_learner(model_folder, quantization=quantization, **settings)
    folded = weights_of(build_learner(model_folder, quantization=quantization))
    for name, parameter in learner.model.named_parameters():
        assert torch.equal(safe_get_full_fp32_param(parameter), folded[name]), name
    start = weights_of(learner)
    assert all(torch.equal(start[name], folded[name].bfloat16()) for name in folded)
    for _ in range(3):
        learner.train_step([SAMPLES])
    name, parameter = next((n, p) for n, p in learner.model.named_parameters() if n.endswith("gate_proj.weight"))
    change = (safe_get_full_fp32_param(parameter) - folded[name]).abs().max().item()
    assert 2e-6 < change < 4e-6, "three Adam steps of 1e-6, far below the resolution of bfloat16"


def test_bfloat16_gradients_accumulate_in_float32(model_folder):
    settings = {"dtype": LearnerDtype.bfloat16}
    learners = [build_learner(model_folder, max_tokens_per_micro_batch=budget, **settings) for budget in (10_000, 1)]
    norms = [metrics_of(learner.train_step([SAMPLES]))["policy/grad_norm"] for learner in learners]
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)  # bfloat16 backward: 8 bits per product, in another order


@pytest.mark.parametrize("zero_stage, dtype", STAGES_AND_DTYPES)
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_samples(model_folder, tmp_path, zero_stage, dtype):
    learner, untouched = (build_learner(model_folder, zero_stage=zero_stage, dtype=dtype) for _ in range(2))
    poisoned = [dataclasses.replace(SAMPLES[0], sample_id="bad/0", advantages=[math.nan] * len(SAMPLES[0].advantages)), *SAMPLES]
    start = weights_of(learner)
    with pytest.raises(NonFiniteLoss, match="not applied") as failure:
        learner.train_step([poisoned], tmp_path)
    assert "bad/0" in failure.value.sample_ids
    saved = json.loads((tmp_path / "nonfinite_rank0.json").read_text())
    assert [s["sample_id"] for s in saved["samples"]] == [s.sample_id for s in poisoned]
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights_of(learner).items())
    for each in (learner, untouched):
        each.train_step([SAMPLES])
    expected = weights_of(untouched)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(learner).items())


def test_a_gradient_that_is_not_finite_stops_the_step_too(model_folder):
    learner = build_learner(model_folder)
    learner.model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    start = weights_of(learner)
    with pytest.raises(NonFiniteLoss, match="gradient"):
        learner.train_step([SAMPLES])
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights_of(learner).items())


@pytest.mark.parametrize("zero_stage, dtype", STAGES_AND_DTYPES)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(model_folder, tmp_path, zero_stage, dtype):
    quantization = QuantizationConfig(update_awareness=UpdateAwareness.invariant_scaling)
    settings = {"quantization": quantization, "zero_stage": zero_stage, "dtype": dtype, "warmup_steps": 7}
    half = len(SAMPLES) // 2
    batches = [[SAMPLES[:half], SAMPLES[half:]], [build_samples(seed=1)], [build_samples(seed=2)], [SAMPLES]]
    unbroken, first = (build_learner(model_folder, **settings) for _ in range(2))
    expected = [metrics_of(unbroken.train_step(batch)) for batch in batches]
    found = [metrics_of(first.train_step(batch)) for batch in batches[:2]]
    first.save_checkpoint(tmp_path)
    drawn = torch.rand(3)
    resumed = build_learner(model_folder, **settings)
    resumed.load_checkpoint(tmp_path)
    assert torch.equal(torch.rand(3), drawn)
    assert resumed.num_optimizer_steps == 3
    found += [metrics_of(resumed.train_step(batch)) for batch in batches[2:]]
    assert found == expected
    weights = weights_of(unbroken)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(resumed).items())


def test_a_checkpoint_of_another_kind_of_run_is_refused(model_folder, tmp_path):
    build_learner(model_folder).save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"zero_stage.*set them alike"):
        build_learner(model_folder, zero_stage=2).load_checkpoint(tmp_path)


def test_the_learning_rate_warms_up_linearly(model_folder):
    learner = build_learner(model_folder, warmup_steps=4, learning_rate=1e-3)
    rates = [metrics_of(learner.train_step([SAMPLES[:2]]))["policy/learning_rate"] for _ in range(6)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_invariant_scaling_is_in_the_weights_and_keeps_the_function(model_folder):
    quantization = QuantizationConfig(update_awareness=UpdateAwareness.invariant_scaling, invariant_scale=2.0)
    folded, plain = build_learner(model_folder, quantization=quantization), build_learner(model_folder)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights_of(folded)[name] * 2, weights_of(plain)[name])
    first, second = (metrics_of(learner.train_step([SAMPLES])) for learner in (folded, plain))
    assert first["policy/entropy"] == pytest.approx(second["policy/entropy"], rel=1e-5)


@pytest.mark.parametrize("zero_stage, dtype", [(0, LearnerDtype.float32), (3, LearnerDtype.bfloat16)])
def test_the_multiplier_moves_the_layers_that_invariant_scaling_touches_and_no_other(model_folder, zero_stage, dtype):
    settings = {"zero_stage": zero_stage, "dtype": dtype, "learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 2}
    plain, multiplied = (build_learner(model_folder, scaled_layers_multiplier=m, **settings) for m in (1.0, 3.0))
    start = weights_of(plain)
    metrics = [metrics_of(learner.train_step([SAMPLES])) for learner in (plain, multiplied)]
    assert [m["policy/learning_rate"] for m in metrics] == [5e-3, 5e-3]
    (once, thrice), touched = (weights_of(learner) for learner in (plain, multiplied)), 0
    for name, before in start.items():
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") and name.endswith("weight"):
            touched += 1
            decayed = before.float() * (1 - 5e-3 * 0.1)  # once in both: the multiplier is for Adam's step alone
            rounding = 2**-6 * before.abs().max().item()  # half a unit of bfloat16, and three times as much
            bound = 1e-6 if dtype is LearnerDtype.float32 else rounding
            torch.testing.assert_close(thrice[name].float() - decayed, 3 * (once[name].float() - decayed), rtol=0, atol=bound)
        else:
            assert torch.equal(thrice[name], once[name]), name
    assert touched == 10


def test_a_checkpoint_remembers_the_multiplier(model_folder, tmp_path):
    learner = build_learner(model_folder, scaled_layers_multiplier=1.5)
    learner.train_step([SAMPLES])
    learner.save_checkpoint(tmp_path)
    resumed = build_learner(model_folder, scaled_layers_multiplier=1.5)
    resumed.load_checkpoint(tmp_path)
    for each in (learner, resumed):
        each.train_step([SAMPLES])
    expected = weights_of(learner)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(resumed).items())
    with pytest.raises(ValueError, match="scaled_layers_multiplier"):
        build_learner(model_folder).load_checkpoint(tmp_path)


def test_scaling_by_s_and_the_multiplier_move_a_matrix_alike_in_adams_first_step(model_folder):
    """Adam's first step is learning_rate * sign(gradient), whatever the size of the gradient."""
    settings = {"learning_rate": 1e-3, "max_grad_norm": 1e9, "adam_epsilon": 1e-20}
    scaling = QuantizationConfig(update_awareness=UpdateAwareness.invariant_scaling, invariant_scale=1.5)
    folded = build_learner(model_folder, quantization=scaling, **settings)
    control = build_learner(model_folder, scaled_layers_multiplier=1.5, **settings)
    start = weights_of(control)
    for learner in (folded, control):
        learner.train_step([SAMPLES])
    name = "model.layers.1.self_attn.q_proj.weight"
    moved = [1.5 * weights_of(folded)[name] - start[name], weights_of(control)[name] - start[name]]
    assert (moved[0] - moved[1]).abs().median() < 1e-6  # both 1.5e-3; gradients of about 0 may differ in sign
    assert moved[1].abs().median().item() == pytest.approx(1.5e-3, rel=1e-3)


@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_folder_loads_as_the_trained_model(tmp_path, zero_stage, tied):
    source, target = tmp_path / "source", tmp_path / "target"
    build_model(tie_word_embeddings=tied).save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    learner = build_learner(source, zero_stage=zero_stage)
    learner.train_step([SAMPLES])
    learner.export_hf(target)
    assert (target / "tokenizer.json").read_text() == "{}"
    loaded = AutoModelForCausalLM.from_pretrained(target)
    weights = weights_of(learner)
    assert ("lm_head.weight" in weights) is not tied
    assert weights.keys() == dict(loaded.named_parameters()).keys()
    assert all(torch.equal(weights[name], p) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_recomputation_works_with_partitioned_gradients_and_weights(tmp_path, monkeypatch, zero_stage, tied):
    build_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
    plain = build_learner(tmp_path, adam_epsilon=1e-3)
    plain.train_step([SAMPLES])
    monkeypatch.setattr("qurl.learner.scored_head.LOGIT_BYTES", 7 * 300 * 4)  # 7 tokens per chunk
    persistence = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # not even small weights stay whole
    learner = build_learner(
        tmp_path, adam_epsilon=1e-3, zero_stage=zero_stage, activation_checkpointing=True, max_tokens_per_micro_batch=64,
        deepspeed=persistence if zero_stage == 3 else {},
    )
    learner.train_step([SAMPLES])
    expected = weights_of(plain)
    for name, weight in weights_of(learner).items():
        # one Adam step of about 1e-3 with a large epsilon, from gradients equal to 1e-5
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("stage", "dtype", "offloaded", "relative"),
    [
        (2, LearnerDtype.float32, ["offload_optimizer"], 1e-5),
        (3, LearnerDtype.bfloat16, ["offload_optimizer", "offload_param"], 2**-7),  # a master near a boundary of rounding
    ],
)
def test_offloading_to_host_memory_trains_the_same_weights(model_folder, stage, dtype, offloaded, relative):
    found = []
    for names in ([], offloaded):
        deepspeed = {"zero_optimization": {name: {"device": "cpu"} for name in names}}
        learner = build_learner(
            model_folder, zero_stage=stage, dtype=dtype, deepspeed=deepspeed, adam_epsilon=1e-3, max_tokens_per_micro_batch=32
        )
        learner.train_step([SAMPLES[:6], SAMPLES[6:]])
        found.append(weights_of(learner))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=relative, atol=1e-6, msg=name)


def without_advantages(samples):
    return [dataclasses.replace(sample, advantages=[0.0] * len(sample.advantages)) for sample in samples]


@pytest.mark.parametrize("zero_stage, dtype", STAGES_AND_DTYPES)
def test_mini_batches_without_advantages_are_skipped_and_the_optimizer_steps_all_the_same(model_folder, zero_stage, dtype):
    found = []
    for skips in (True, False):
        learner = build_learner(
            model_folder, zero_stage=zero_stage, dtype=dtype, weight_decay=0.1, warmup_steps=5, max_tokens_per_micro_batch=32,
            learning_rate=1e-2,
        )
        learner.train_step([SAMPLES])  # from here on the optimizer has moments
        if not skips:  # a term that forbids it; the loss itself has none
            learner._algorithm = dataclasses.replace(learner._algorithm, entropy_coefficient=1.0)
        backwards = []
        learner.model.model.embed_tokens.weight.register_hook(lambda _, calls=backwards: calls.append(1))
        before = weights_of(learner)
        metrics = metrics_of(learner.train_step([without_advantages(SAMPLES[:6]), SAMPLES[6:], without_advantages(SAMPLES)]))
        assert metrics["policy/num_skipped_mini_batches"] == (2 if skips else 0)
        assert metrics["policy/num_optimizer_steps"] == 3 and learner.num_optimizer_steps == 4
        assert metrics["policy/learning_rate"] == pytest.approx(1e-2 * 4 / 5) and metrics["mismatch/kl_rollout_old"] > 0
        found.append((weights_of(learner), metrics["policy/grad_norm"], len(backwards)))
    assert all(torch.equal(weight, found[1][0][name]) for name, weight in found[0][0].items())
    assert found[0][1] == found[1][1]
    assert found[0][2] < found[1][2], "backward runs for the mini-batch in the middle and two empty micro-batches"
    assert not torch.equal(before["model.norm.weight"], found[0][0]["model.norm.weight"])


@pytest.mark.parametrize("algorithm", [
    AlgorithmConfig(kl=KLConfig(coefficient=0.1)), AlgorithmConfig(entropy_coefficient=0.1), EVERYTHING,
    AlgorithmConfig(policy_loss=PolicyLossConfig(name="qurl.algorithms.policy_losses:ppo_clip")),
])
def test_terms_that_need_no_advantage_are_trained_without_any(model_folder, algorithm):
    learner = build_learner(model_folder, algorithm=algorithm)
    metrics = metrics_of(learner.train_step([without_advantages(SAMPLES)]))
    assert metrics["policy/num_skipped_mini_batches"] == 0 and metrics["policy/tokens"] == sum(sum(s.loss_mask) for s in SAMPLES)
