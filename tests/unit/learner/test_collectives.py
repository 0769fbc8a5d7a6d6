"""Two ranks whose batches have nothing in common: they call the same collectives in the same order, and train what one rank trains.

Each rank records every collective of torch.distributed and every module that is called, and leaves the record in a file."""

import dataclasses
import functools
import gc
import os
import random
from datetime import timedelta

import pytest
import torch
from learner_cases import PPO, VOCAB, build_learner, build_sample, spawn_ranks

from qurl.config import CriticConfig, LearnerDtype
from qurl.observability.metrics import reduce_metrics

EVERY_KIND = {
    "algorithm": dataclasses.replace(PPO, entropy_coefficient=0.02), "critic": CriticConfig(learning_rate=1e-3), "temperature": 1.3,
}
CASES = [  # ZeRO stage, activation checkpointing, dtype
    (0, False, LearnerDtype.float32), (2, True, LearnerDtype.float32), (3, False, LearnerDtype.float32),
    (3, True, LearnerDtype.float32), (3, True, LearnerDtype.bfloat16),
]
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "broadcast", "broadcast_object_list", "all_to_all", "all_to_all_single", "gather", "scatter", "barrier", "_all_gather_base",
    "_reduce_scatter_base", "all_reduce_coalesced",
)


def draw_samples(draw, count):
    """Samples of 1 to 60 trained tokens; a third of them have a single one."""
    samples = []
    for index in range(count):
        num_prompt, num_trained = draw.randrange(1, 6), draw.choice([1, draw.randrange(1, 20), draw.randrange(1, 61)])
        samples.append(build_sample(
            [draw.randrange(3, VOCAB) for _ in range(num_prompt + num_trained)], num_prompt, sample_id=f"p{index // 2}/{index % 2}",
            advantage=draw.choice([-1.0, 0.5, 1.5]), rollout_logprob=-draw.uniform(1.0, 9.0), reward=draw.uniform(0.0, 1.0),
        ))
    return samples


def uneven(lengths):
    """One sample of each length, in trained tokens."""
    draw = random.Random(len(lengths))
    return [
        build_sample([draw.randrange(3, VOCAB) for _ in range(2 + n)], 2, sample_id=f"p{i}/0", advantage=0.5 + i, reward=0.3 * i)
        for i, n in enumerate(lengths)
    ]


def iterations():
    """shares[rank][mini_batch] of each iteration: 60 tokens against 5, a rank without any, then random ones."""
    sixty, five = uneven([60, 5])
    found = [[[[sixty]], [[five]]], [[uneven([9, 30, 2])], [[]]]]
    for seed in range(3):
        draw = random.Random(seed)
        num_mini_batches = draw.randrange(1, 4)
        shares = [[[] for _ in range(num_mini_batches)] for _ in range(2)]
        for sample in draw_samples(draw, draw.randrange(num_mini_batches, 9)):
            shares[draw.choice([0, 0, 1])][draw.randrange(num_mini_batches)].append(sample)
        found.append(shares)
    return found


def record_collectives():
    """Return the list to which every collective of this process is appended from now on, with the size of its first tensor."""
    calls = []

    def recorded(name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            calls.append((name, tensors[0].numel() if tensors else None))
            return function(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        for module in (torch.distributed, torch.distributed.distributed_c10d):
            if hasattr(module, name):
                setattr(module, name, recorded(name, getattr(module, name)))
    return calls


def timeouts_of_groups():
    """How long each process group of this process waits, those of DeepSpeed's own among them."""
    groups = list(torch.distributed.distributed_c10d._world.pg_map)
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def record_modules(learner, calls):
    """Append the name of each module that policy and critic call."""
    engines = {"policy": learner._engine} | ({} if learner._critic is None else {"critic": learner._critic.engine})
    for kind, engine in engines.items():
        for name, module in engine.module.named_modules():
            module.register_forward_pre_hook(lambda *_, label=f"{kind}.{name}": calls.append((label, None)))


def train(learner, shares_of_rank):
    """Run iterations; (gradients before each optimizer step by name, reports of each iteration)."""
    from deepspeed.utils import safe_get_full_grad

    import qurl.learner.learner as where

    gradients, apply = [], where.apply_gradients

    def apply_and_note(engine):
        gradients.append({name: safe_get_full_grad(p).float().clone() for name, p in engine.module.named_parameters()})
        return apply(engine)

    where.apply_gradients = apply_and_note
    try:
        return gradients, [learner.train_step(shares).reports for shares in shares_of_rank]
    finally:
        where.apply_gradients = apply


def settings_of(stage, checkpointing, dtype):
    whole = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # not even small weights stay whole
    return EVERY_KIND | {
        "zero_stage": stage, "activation_checkpointing": checkpointing, "dtype": dtype, "adam_epsilon": 1e-3,
        "max_tokens_per_micro_batch": 70, "deepspeed": whole if stage == 3 else {},
    }


def run_rank(rank, port, model_folder, folder):
    os.environ["DS_ACCELERATOR"] = "cpu"
    calls = record_collectives()
    import deepspeed  # noqa: F401

    import qurl.learner.scored_head

    qurl.learner.scored_head.LOGIT_BYTES = 7 * VOCAB * 4
    gc.freeze()  # as in conftest.py
    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        learner = build_learner(model_folder, rank=rank, world_size=2, port=port, **settings_of(*case))
        record_modules(learner, calls)
        calls.clear()
        gradients, reports = train(learner, [shares[rank] for shares in iterations()])
        learner.probe(iterations()[0][rank][0], 1)
        for _ in learner.iter_weights():
            pass
        found["timeouts"] = timeouts_of_groups()
        found[case] = {"calls": list(calls), "gradients": gradients, "reports": reports}
    learner.save_checkpoint(folder / "checkpoint")
    torch.save(found, folder / f"rank{rank}.pt")
    gc.unfreeze()


@pytest.fixture(scope="module")
def two_ranks(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("collectives")
    spawn_ranks(run_rank, model_folder, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def one_rank(model_folder):
    """What a rank alone makes of both shares, with all logits at once: (gradients, reports)."""
    joined = [[a + b for a, b in zip(*shares, strict=True)] for shares in iterations()]
    return train(build_learner(model_folder, **settings_of(0, False, LearnerDtype.float32)), joined)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_shape_of_batch_makes_ranks_disagree_on_what_they_call_next(two_ranks, case):
    first, second = (found[case]["calls"] for found in two_ranks)
    assert {"all_gather_object", "policy.head", "critic.head"} <= {name for name, _ in first}
    assert first == second


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_of_unequal_number_leave_loss_and_gradients_as_they_are(one_rank, two_ranks, case):
    gradients, reports = one_rank
    is_exact = case[-1] is LearnerDtype.float32
    relative = 1e-4 if is_exact else 0.2  # float32 sums in another order; bfloat16 throughout
    for found in two_ranks:
        assert len(found[case]["gradients"]) == len(gradients) >= 10
        for step, expected in enumerate(gradients if is_exact else gradients[:2]):
            for name, gradient in expected.items():
                error = (found[case]["gradients"][step][name] - gradient).norm().item()
                assert error <= relative * gradient.norm().item(), (step, name)
    for iteration, expected in enumerate(reports if is_exact else reports[:1]):
        joined = reduce_metrics(report for found in two_ranks for report in found[case]["reports"][iteration])
        expected = reduce_metrics(expected)
        for key in ("policy/loss", "critic/loss", "policy/entropy"):
            assert joined[key] == pytest.approx(expected[key], rel=relative, abs=1e-5), key


def test_every_process_group_waits_for_a_slow_disk(two_ranks):
    for found in two_ranks:
        assert len(found["timeouts"]) > 1, "DeepSpeed makes groups of its own"
        assert set(found["timeouts"]) == {timedelta(hours=2)}
