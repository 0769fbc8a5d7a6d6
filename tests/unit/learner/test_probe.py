"""The probe, with an engine whose arithmetic is written out here."""

import dataclasses

import pytest
import torch
from learner_cases import build_learner, build_model, build_samples
from torch import nn
from torch.nn import functional

from qurl.config import QuantizationConfig, UpdateAwareness
from qurl.observability.metrics import reduce_metrics
from qurl.quantization import FORMATS, fold_invariant_scaling, with_precision

SAMPLES = build_samples()
TEMPERATURE = 0.8


class Int8Linear(nn.Module):
    """W8A8 as an engine holds it: whole numbers and scales, in float64."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        self.scale = weight.abs().amax(1) / 127
        self.codes = (weight / self.scale[:, None]).round()
        self.bias = linear.bias

    def forward(self, x):
        scale = x.abs().amax(-1, keepdim=True) / 127
        out = ((x * (1 / scale)).round().double() @ self.codes.double().T) * scale.double() * self.scale.double()
        return (out if self.bias is None else out + self.bias.double()).float()


def engine_model(is_quantized, scaled=False):
    """The tiny model with engine arithmetic in the linear layers that `is_quantized` names."""
    model = build_model(tie_word_embeddings=True)
    if scaled:
        fold_invariant_scaling(model, 1.5)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head" and is_quantized(name):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Int8Linear(module))
    return model


@torch.no_grad()
def logprobs(model, sample):
    logits = model(torch.tensor([sample.token_ids])).logits[0, :-1] / TEMPERATURE
    picked = logits.log_softmax(-1).gather(1, torch.tensor(sample.token_ids[1:])[:, None])[:, 0]
    return functional.pad(picked, (1, 0))


def sampled_by(model, samples):
    """The samples with this model's logprobs as the engine's."""
    found = []
    for sample in samples:
        masked = logprobs(model, sample).where(torch.tensor(sample.loss_mask), 0.0)
        found.append(dataclasses.replace(sample, rollout_logprobs=masked.tolist()))
    return found


def k3(target, source, samples):
    """Mean of rho - 1 - log rho over trained tokens, rho = target / source, in float64."""
    log_rho = torch.cat([
        (logprobs(target, s).double() - logprobs(source, s).double())[torch.tensor(s.loss_mask)] for s in samples
    ])  # fmt: skip
    return (log_rho.exp() - 1 - log_rho).mean().item()


@pytest.mark.parametrize("case", ["plain", "ignored and scaled"])
def test_an_engine_that_computes_exactly_leaves_all_of_the_gap_to_quantization(model_folder, case):
    plain = case == "plain"
    quantization = QuantizationConfig(format="int8") if plain else QuantizationConfig(
        format="int8", ignore=["down_proj"], update_awareness=UpdateAwareness.invariant_scaling, invariant_scale=1.5,
    )  # fmt: skip
    engine = engine_model(lambda name: plain or "down_proj" not in name, scaled=not plain)
    learner = build_learner(model_folder, quantization=quantization, temperature=TEMPERATURE, max_tokens_per_micro_batch=64)
    found = reduce_metrics(learner.probe(sampled_by(engine, SAMPLES), 0).reports)
    expected = k3(build_model(tie_word_embeddings=True), engine, SAMPLES)
    # Sums in another order than here: an activation that lies on the border of two codes may get the other one.
    assert found["mismatch/quantization_kl"] == pytest.approx(expected, rel=0.05) and expected > 1e-4
    assert found["mismatch/engine_kl"] < 0.05 * expected


def test_the_codes_are_those_of_the_version_that_was_sent(model_folder):
    rounding = QuantizationConfig(format="int8", update_awareness=UpdateAwareness.stochastic_rounding)
    learner, other = (build_learner(model_folder, quantization=rounding) for _ in range(2))
    for each, versions in ((learner, [0, 1]), (other, [1])):
        for version in versions:
            each.send_weights(version, [])
    found = [reduce_metrics(each.probe(SAMPLES, 1).reports) for each in (learner, other)]
    assert found[0] == found[1]
    learner.send_weights(2, [])
    assert reduce_metrics(learner.probe(SAMPLES, 2).reports)["mismatch/quantization_kl"] != found[0]["mismatch/quantization_kl"]


def test_without_quantization_only_the_engine_and_older_weights_are_left(model_folder):
    learner = build_learner(model_folder)
    old = [dataclasses.replace(sample, weight_version=3) for sample in SAMPLES[:6]]
    new = [dataclasses.replace(sample, weight_version=4) for sample in SAMPLES[6:]]
    found = reduce_metrics(learner.probe([*old, *new], 4).reports)
    assert found["mismatch/quantization_kl"] == 0 and found["mismatch/quantization_ratio_max"] == 1
    for key, samples in (("staleness", old), ("engine", new)):
        alone = reduce_metrics(build_learner(model_folder).train_step([samples]).reports)
        assert found[f"mismatch/{key}_kl"] == pytest.approx(alone["mismatch/kl_rollout_old"], rel=1e-5)  # float32 logprobs


class FormatLinear(nn.Module):
    """What a format says that an engine computes."""

    def __init__(self, format, linear):
        super().__init__()
        self.format, self.bias = format, linear.bias
        self.wire = format.encode(linear.weight.detach())

    def forward(self, x):
        return self.format.linear(x, self.wire, self.bias)


def test_every_layer_has_the_precision_that_the_engines_give_it(model_folder):
    precision = {"down_proj": "k4-w1-a1g1", r"re:.*\.0\.mlp\.(gate|up)_proj": "k2-w2g8-a2", "re:.*_proj": "k2-w4-a4"}
    learner = build_learner(
        model_folder, quantization=QuantizationConfig(format="axbxp", precision=precision), temperature=TEMPERATURE
    )  # fmt: skip
    model = build_model(tie_word_embeddings=True)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    format = with_precision(FORMATS["axbxp"], precision, names)
    held = learner.decoded_weights(0, len(names))
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = FormatLinear(format.of_layer(name), getattr(model.get_submodule(parent), leaf))
        assert torch.equal(held[name], layer.format.decode(layer.wire))
        setattr(model.get_submodule(parent), leaf, layer)
    found = reduce_metrics(learner.probe(sampled_by(model, SAMPLES[:6]), 0).reports)
    assert found["mismatch/quantization_kl"] > 1e-3 and found["mismatch/engine_kl"] < 0.05 * found["mismatch/quantization_kl"]


def test_the_floor_is_what_rounding_makes_of_two_engines_with_the_same_codes(model_folder):
    """A second engine whose embeddings differ in their last bits stands for other kernels: its engine_kl is about the floor."""
    found = {}
    for format in ("none", "int8"):
        quantization = QuantizationConfig(format=format)
        learner = build_learner(model_folder, quantization=quantization, temperature=TEMPERATURE)
        engine = engine_model(lambda name, format=format: format == "int8", scaled=False)
        embedding = engine.get_input_embeddings()
        noise = 1e-6 * torch.randn(embedding.weight.shape, generator=torch.Generator().manual_seed(9))
        embedding.register_forward_hook(lambda module, args, output, noise=noise: output * (1 + noise[args[0]]))
        found[format] = reduce_metrics(learner.probe(sampled_by(engine, SAMPLES), 0).reports)
    assert 0 <= found["none"]["mismatch/engine_kl_floor"] < 1e-9, "float32 does not amplify"
    floor, engine_kl = found["int8"]["mismatch/engine_kl_floor"], found["int8"]["mismatch/engine_kl"]
    assert 0 < floor < found["int8"]["mismatch/quantization_kl"]
    assert floor / 30 < engine_kl < 30 * floor, "a few activations in a tiny model change their code, so the two are only alike"


def test_where_the_engines_are_in_bfloat16_the_floor_is_that_of_bfloat16(model_folder):
    floors = []
    for dtype in ("float32", "bfloat16"):
        learner = build_learner(model_folder, quantization=QuantizationConfig(format="int8"), engine_dtype=dtype)
        floors.append(reduce_metrics(learner.probe(SAMPLES, 0).reports)["mismatch/engine_kl_floor"])
    assert floors[1] > 10 * floors[0]


@pytest.mark.parametrize("format", ["int8", "fp8", "fp8_block"])
def test_a_probe_leaves_no_trace_in_training(model_folder, format):
    quantization = QuantizationConfig(format=format)
    probed, plain = (build_learner(model_folder, quantization=quantization) for _ in range(2))
    assert reduce_metrics(probed.probe(SAMPLES[:4], 0).reports)["mismatch/quantization_kl"] > 1e-5
    assert probed.train_step([SAMPLES]).reports == plain.train_step([SAMPLES]).reports
