"""Two gloo ranks against one: spreading samples changes no gradient, every ZeRO stage trains the same weights.

The two ranks run all cases in one go and leave what they found in files, since starting them is what takes long."""

import dataclasses
import gc
import os

import pytest
import torch
from learner_cases import (
    EVERYTHING,
    PPO,
    VOCAB,
    build_learner,
    build_samples,
    captured_gradients,
    spawn_ranks,
    weights_of,
    with_kept_tokens,
)

from qurl.config import Aggregation, AlgorithmConfig, CriticConfig, KLConfig, LearnerDtype, PolicyLossConfig, QuantizationConfig
from qurl.errors import NonFiniteLoss
from qurl.learner.splitting import split_for_ranks
from qurl.observability.metrics import reduce_metrics

SAMPLES = build_samples()
ALGORITHM = AlgorithmConfig(
    policy_loss=PolicyLossConfig(aggregation=Aggregation.sequence_mean), kl=KLConfig(coefficient=0.05),
)
SETTINGS = {"algorithm": ALGORITHM, "max_tokens_per_micro_batch": 32, "adam_epsilon": 1e-3}
CRITIC = {"algorithm": PPO, "critic": CriticConfig(learning_rate=1e-2, value_clip=0.1)}
CASES = [*((stage, LearnerDtype.float32) for stage in range(4)), (0, LearnerDtype.bfloat16), (3, LearnerDtype.bfloat16)]


INT8 = QuantizationConfig(format="int8")


def probed_share(rank, num_ranks=2):
    """One rank's of a few samples of two weight versions."""
    samples = [dataclasses.replace(sample, weight_version=i % 2) for i, sample in enumerate(SAMPLES[:5])]
    return split_for_ranks(samples, 1, num_ranks)[rank][0]


def train(learner, rank, num_ranks):
    """Two iterations of two optimizer steps, the second on tokens that top-p or top-k cut; what each reported."""
    iterations = [build_samples(seed=0), with_kept_tokens(build_samples(seed=1), sizes=(5, 150, 250, VOCAB))]
    return [learner.train_step(split_for_ranks(samples, 2, num_ranks)[rank]).reports for samples in iterations]


def run_rank(rank, port, model_folder, folder):
    os.environ |= {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(folder / "compiled")}
    import deepspeed  # noqa: F401

    gc.freeze()  # as in conftest.py
    torch.set_num_threads(1)
    found = {}

    def build(**settings):
        return build_learner(model_folder, rank=rank, world_size=2, port=port, **(SETTINGS | settings))

    learner = build()
    with captured_gradients(learner) as found["gradients"]:
        learner.train_step([SAMPLES] if rank == 0 else [[]])  # all samples on one rank: the other runs empty micro-batches
    learner = build(algorithm=EVERYTHING)
    with captured_gradients(learner) as found["everything"]:
        found["everything reports"] = train(learner, rank, 2)
    learner = build(**CRITIC)
    with captured_gradients(learner) as found["critic"]:
        found["critic reports"] = train(learner, rank, 2)
    for stage, dtype in CASES:
        learner = build(zero_stage=stage, dtype=dtype)
        found[stage, dtype] = {"reports": train(learner, rank, 2), "share": weights_of(learner)}
    learner = build(zero_stage=3)
    train(learner, rank, 2)
    learner.save_checkpoint(folder / "checkpoint")
    learner.train_step(split_for_ranks(SAMPLES, 2, 2)[rank])
    resumed = build(zero_stage=3)
    resumed.load_checkpoint(folder / "checkpoint")
    resumed.train_step(split_for_ranks(SAMPLES, 2, 2)[rank])
    found["probe"] = [build(zero_stage=stage, quantization=INT8).probe(probed_share(rank), 1).reports for stage in (0, 3)]
    found["resumed"], found["unbroken"] = weights_of(resumed), weights_of(learner)
    learner.export_hf(folder / "exported")
    if rank == 0:
        learner.model.model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
    try:
        learner.train_step(split_for_ranks(SAMPLES, 2, 2)[rank])
    except NonFiniteLoss as failure:
        found["failure"] = str(failure)
    torch.save(found, folder / f"rank{rank}.pt")
    gc.unfreeze()


@pytest.fixture(scope="module")
def one_rank(model_folder):
    """What a single rank without ZeRO finds."""
    learner = build_learner(model_folder, **SETTINGS)
    with captured_gradients(learner) as gradients:
        learner.train_step([SAMPLES])
    learner = build_learner(model_folder, **(SETTINGS | {"algorithm": EVERYTHING}))
    with captured_gradients(learner) as everything:
        everything_reports = train(learner, 0, 1)
    learner = build_learner(model_folder, **(SETTINGS | CRITIC))
    with captured_gradients(learner) as critic:
        critic_reports = train(learner, 0, 1)
    learner = build_learner(model_folder, **SETTINGS)
    return {
        "everything": everything, "everything reports": everything_reports, "critic": critic, "critic reports": critic_reports,
        "gradients": gradients,
        "reports": train(learner, 0, 1), "weights": weights_of(learner),
    }


@pytest.fixture(scope="module")
def two_ranks(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn_ranks(run_rank, model_folder, folder)
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_spreading_samples_over_ranks_changes_no_gradient(one_rank, two_ranks):
    for found in two_ranks[1]:
        for name, expected in one_rank["gradients"].items():
            bound = 1e-5 * expected.abs().max().item()  # float32 sums in another order
            torch.testing.assert_close(found["gradients"][name], expected, rtol=0, atol=bound, msg=name)


def test_a_rank_waits_for_no_compiler(two_ranks):
    assert not (two_ranks[0] / "compiled").exists()


@pytest.mark.parametrize("case", ["everything", "critic"])
def test_nor_what_looks_at_sequences_mini_batches_and_iterations(one_rank, two_ranks, case):
    for found in two_ranks[1]:
        for name, expected in one_rank[case].items():
            bound = 1e-4 * expected.abs().max().item()  # of the fourth optimizer step, after three that differ in the last bits
            torch.testing.assert_close(found[case][name], expected, rtol=0, atol=bound, msg=name)
    for iteration, reports in enumerate(one_rank[f"{case} reports"]):
        expected = reduce_metrics(reports)
        joined = reduce_metrics(report for found in two_ranks[1] for report in found[f"{case} reports"][iteration])
        del expected["policy/padding_fraction"], joined["policy/padding_fraction"]
        assert joined == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("stage", range(4))
def test_every_zero_stage_trains_the_weights_of_a_single_rank(one_rank, two_ranks, stage):
    weights = {name: t for found in two_ranks[1] for name, t in found[stage, LearnerDtype.float32]["share"].items()}
    for name, expected in one_rank["weights"].items():
        # four Adam steps of about 1e-3 with a large epsilon, from gradients equal to 1e-5
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("stage", [0, 3])
def test_bfloat16_ranks_stay_near_the_float32_run(one_rank, two_ranks, stage):
    weights = {name: t for found in two_ranks[1] for name, t in found[stage, LearnerDtype.bfloat16]["share"].items()}
    for name, expected in one_rank["weights"].items():
        assert weights[name].dtype == torch.bfloat16
        # half a unit of bfloat16, and steps of at most 4e-3 in all
        torch.testing.assert_close(weights[name].float(), expected, rtol=2**-8, atol=4e-3, msg=name)


@pytest.mark.parametrize("stage", range(4))
def test_shares_cover_every_weight_once_and_are_of_similar_size(one_rank, two_ranks, stage):
    shares = [found[stage, LearnerDtype.float32]["share"] for found in two_ranks[1]]
    assert sorted([*shares[0], *shares[1]]) == sorted(one_rank["weights"])
    sizes = [sum(t.numel() for t in share.values()) for share in shares]
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize("stage", range(4))
def test_metrics_of_ranks_join_to_those_of_a_single_rank(one_rank, two_ranks, stage):
    per_rank = [found[stage, LearnerDtype.float32]["reports"] for found in two_ranks[1]]
    for iteration, reports in enumerate(one_rank["reports"]):
        expected = reduce_metrics(reports)
        joined = reduce_metrics(report for rank in per_rank for report in rank[iteration])
        del expected["policy/padding_fraction"], joined["policy/padding_fraction"]
        assert joined == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_probe_over_two_ranks_finds_what_one_rank_finds(model_folder, two_ranks):
    learner = build_learner(model_folder, **SETTINGS, quantization=INT8)
    expected = reduce_metrics(learner.probe(probed_share(0, num_ranks=1), 1).reports)
    assert {"mismatch/engine_kl", "mismatch/staleness_kl"} < expected.keys()
    for of_stage in zip(*(found["probe"] for found in two_ranks[1]), strict=True):
        joined = reduce_metrics(report for reports in of_stage for report in reports)
        assert joined == pytest.approx(expected, rel=1e-3)  # other packings, float32 sums in another order


def test_two_zero3_ranks_resume_bit_for_bit_and_export(two_ranks):
    folder, ranks = two_ranks
    for found in ranks:
        assert found["resumed"].keys() == found["unbroken"].keys()
        assert all(torch.equal(tensor, found["unbroken"][name]) for name, tensor in found["resumed"].items())
    from transformers import AutoModelForCausalLM

    exported = dict(AutoModelForCausalLM.from_pretrained(folder / "exported").named_parameters())
    assert all(torch.equal(tensor, exported[name]) for found in ranks for name, tensor in found["unbroken"].items())


def test_a_gradient_that_is_not_finite_on_one_rank_stops_both(two_ranks):
    assert all("not applied" in found["failure"] for found in two_ranks[1])
