"""Tiny random models, samples and learners that the tests of this folder share; importable by spawned ranks."""

from __future__ import annotations

import random
import socket
import time
from contextlib import contextmanager
from dataclasses import replace

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qurl.config import (
    AdvantageConfig,
    Aggregation,
    AlgorithmConfig,
    CorrectionConfig,
    CriticConfig,
    KLConfig,
    KLEstimator,
    KLPlacement,
    LearnerConfig,
    ModelConfig,
    PolicyLossConfig,
    QuantizationConfig,
    Rejection,
    SyncConfig,
)
from qurl.kept_tokens import pack_sets
from qurl.types import TrainingSample

VOCAB = 300
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
}

EVERYTHING = AlgorithmConfig(
    advantage=AdvantageConfig(name="reinforce_plus_plus_baseline"),
    correction=CorrectionConfig(
        name="sequence_tis", rejection=Rejection.geometric, rejection_low=0.2, rejection_high=6.0, normalize_weights=True,
    ),
    policy_loss=PolicyLossConfig(name="gspo", aggregation=Aggregation.constant, aggregation_constant=24),
    kl=KLConfig(coefficient=0.5, estimator=KLEstimator.k1, placement=KLPlacement.reward),
    entropy_coefficient=0.02,
)
"""Every option that looks beyond one token at once: at the sequence, the mini-batch or the iteration."""

PPO = AlgorithmConfig(
    advantage=AdvantageConfig(name="gae", discount=0.95, gae_lambda=0.9),
    kl=KLConfig(coefficient=0.3, estimator=KLEstimator.k1, placement=KLPlacement.reward),
)
"""A critic, and a penalty for each token."""


def build_model(family: str = "qwen2", **overrides):
    """A random model with weights large enough that its distribution is far from uniform."""
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(7)
    model = model_class(config_class(**(SHAPE | extra | {"initializer_range": 0.3} | overrides)))
    with torch.no_grad():  # biases start at 0, where a mistake in them would not show
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.eval()


def build_sample(token_ids, num_prompt, *, sample_id="p0/0", advantage=1.0, rollout_logprob=-5.0, reward=0.0):
    """A sample whose first num_prompt tokens are the prompt."""
    size = len(token_ids) - num_prompt
    return TrainingSample(
        sample_id=sample_id,
        token_ids=list(token_ids),
        loss_mask=[False] * num_prompt + [True] * size,
        rollout_logprobs=[0.0] * num_prompt + [rollout_logprob] * size,
        advantages=[0.0] * num_prompt + [advantage] * size,
        reward=reward,
        weight_version=0,
    )


def build_samples(num_prompts=4, num_samples=3, seed=0):
    """Samples of very different lengths with rollout logprobs and advantages of both signs."""
    draw = random.Random(seed)
    samples = []
    for prompt in range(num_prompts):
        prompt_ids = [draw.randrange(3, VOCAB) for _ in range(draw.randrange(1, 6))]
        for index in range(num_samples):
            response = [draw.randrange(3, VOCAB) for _ in range(draw.randrange(1, 24))]
            samples.append(build_sample(
                prompt_ids + response, len(prompt_ids), sample_id=f"p{prompt}/{index}",
                advantage=draw.choice([-1.0, 0.5, 1.5]), rollout_logprob=-draw.uniform(1.0, 9.0),
                reward=draw.uniform(0.0, 1.0),
            ))
    return samples


def with_kept_tokens(samples, seed=0, sizes=(1, 2, 7, 40, 250, VOCAB)):
    """The samples with a set for each trained token that holds it; ids and bitmaps, sets of one and whole vocabularies."""
    draw = random.Random(seed)
    found = []
    for sample in samples:
        tokens = [token for token, is_trained in zip(sample.token_ids, sample.loss_mask, strict=True) if is_trained]
        others = [[other for other in range(VOCAB) if other != token] for token in tokens]
        sets = [sorted([token, *draw.sample(o, draw.choice(sizes) - 1)]) for token, o in zip(tokens, others, strict=True)]
        found.append(replace(sample, kept_tokens=pack_sets(tokens, sets, VOCAB)))
    return found


def build_learner(
    folder, *, algorithm=None, critic=None, quantization=None, temperature=1.0, engine_dtype="float32", rank=0, world_size=1,
    port=0, **learner
):
    """A Learner; further keywords are those of LearnerConfig."""
    from qurl.learner.learner import Learner

    options = {"learning_rate": 1e-3, "num_ranks": world_size} | learner
    return Learner(
        ModelConfig(path=str(folder)), LearnerConfig(**options), critic or CriticConfig(), algorithm or AlgorithmConfig(),
        quantization or QuantizationConfig(), SyncConfig(),
        rank=rank, world_size=world_size, master_port=port, temperature=temperature, engine_dtype=engine_dtype,
    )


@contextmanager
def captured_gradients(learner):
    """Yields a dict that each optimizer step at stage 0 fills with the gradients, before clipping; the critic's as critic.name."""
    import qurl.learner.learner as where

    gradients, apply = {}, where.apply_gradients

    def apply_and_capture(engine):
        prefix, module = ("", learner.model) if engine is learner._engine else ("critic.", engine.module)
        gradients.update({f"{prefix}{name}": p.grad.clone() for name, p in module.named_parameters()})
        return apply(engine)

    where.apply_gradients = apply_and_capture
    try:
        yield gradients
    finally:
        where.apply_gradients = apply


def weights_of(learner):
    """Copies of all weights by name; a world of one rank."""
    return {name: tensor.clone() for name, tensor in learner.iter_weights()}


def spawn_ranks(run_rank, *args, num_ranks=2, idle_s=30.0):
    """Run run_rank(rank, port, *args) in processes of their own. Ranks that wait for each other fail instead of hanging: they
    compute nothing for idle_s, however busy the machine is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = torch.multiprocessing.spawn(run_rank, (port, *args), nprocs=num_ranks, join=False)
    processes = [psutil.Process(process.pid) for process in ranks.processes]
    used, since = 0.0, time.monotonic()
    while not ranks.join(timeout=1.0):
        now = sum(sum(process.cpu_times()[:2]) for process in processes if process.is_running())
        if now > used + 1.0:  # gloo polls a little while it waits
            used, since = now, time.monotonic()
        elif time.monotonic() - since > idle_s:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"no rank computed anything for {idle_s:g} s: they wait for each other in a collective")
