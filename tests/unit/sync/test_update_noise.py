"""Updates beside the quantization error, and codes rounded at random, as the stream sends them."""

import pytest
import torch
from sync_cases import LINEARS, LocalEngine, local_config, make_sender, make_weights, nudge, same_bits, update

from qurl.observability.metrics import reduce_metrics
from qurl.quantization import FORMATS, rounding_generator
from qurl.sync import WeightSender, merge_send_reports
from qurl.sync.publisher import _metrics


def test_the_report_holds_the_ratio_of_every_matrix_as_computed_in_float64():
    sender, engine, before = make_sender("int8", track_updates=True), LocalEngine(), make_weights()
    assert update(sender, engine, 1, before).update_to_noise == {}
    after = nudge(before, seed=2)
    report = update(sender, engine, 2, after)
    assert sorted(report.update_to_noise) == sorted(LINEARS)
    for module in LINEARS:
        old, new = before[f"{module}.weight"].double(), after[f"{module}.weight"].double()
        decoded = FORMATS["int8"].decode(FORMATS["int8"].encode(after[f"{module}.weight"])).double()
        expected = ((new - old).square().sum() / (new - decoded).square().sum()).sqrt().item()
        assert report.update_to_noise[module] == pytest.approx(expected, rel=1e-5)
    assert set(update(sender, engine, 3, after).update_to_noise.values()) == {0.0}
    metrics = reduce_metrics([_metrics(2, merge_send_reports([report]), 0.0, 0)])
    assert metrics["quantization/update_to_noise_min"] == min(report.update_to_noise.values())
    assert metrics["quantization/update_to_noise_mean"] == pytest.approx(sum(report.update_to_noise.values()) / len(LINEARS))
    assert {module: metrics[f"quantization/update_to_noise/{module}"] for module in LINEARS} == report.update_to_noise


def test_dividing_the_weights_by_s_multiplies_the_ratio_of_a_step_of_fixed_size_by_s():
    found = {}
    step = {name: 1e-4 * torch.randn(t.shape, generator=torch.Generator().manual_seed(3)) for name, t in make_weights().items()}
    for s in (1.0, 1.5):
        sender, engine = make_sender("int8", track_updates=True), LocalEngine()
        weights = {name: tensor / s for name, tensor in make_weights().items()}
        update(sender, engine, 1, weights)
        found[s] = update(sender, engine, 2, {name: tensor + step[name] for name, tensor in weights.items()}).update_to_noise
    for module in LINEARS:
        assert found[1.5][module] / found[1.0][module] == pytest.approx(1.5, rel=1e-2)  # the step itself moves a few codes


def test_without_the_option_nothing_is_measured_or_kept():
    sender, engine = make_sender("int8"), LocalEngine()
    for version in (1, 2):
        assert update(sender, engine, version, make_weights()).update_to_noise == {}
    assert "quantization/update_to_noise_min" not in _metrics(1, update(sender, engine, 3, make_weights()), 0.0, 0)


def rounding_sender(seed=5, **options):
    return WeightSender(local_config(**options), FORMATS["int8"], frozenset(LINEARS), torch.bfloat16, 0, 1, rounding_seed=seed)


def test_a_version_sent_again_has_the_same_random_codes_and_the_next_one_others():
    weights, first, joined, later = make_weights(), LocalEngine(), LocalEngine(), LocalEngine()
    sender = rounding_sender()
    update(sender, first, 7, weights)
    update(rounding_sender(), joined, 7, weights)
    assert same_bits(joined.installer.tensors, first.installer.tensors)
    for module in LINEARS:
        generator = rounding_generator(5, 7, module, torch.device("cpu"))
        expected = FORMATS["int8"].encode_stochastically(weights[f"{module}.weight"], generator)
        assert torch.equal(first.installer.tensors[f"{module}.weight"], expected["weight"])
        held = FORMATS["int8"].decode({key: first.installer.tensors[f"{module}.{key}"] for key in expected})
        assert torch.equal(sender.decoded(module, weights[f"{module}.weight"]), held), "what an audit compares with"
    update(sender, later, 8, weights)
    assert not same_bits(later.installer.tensors, first.installer.tensors)


def test_changes_of_random_codes_travel_too():
    sender, engine, fresh = rounding_sender(delta=True), LocalEngine(), LocalEngine()
    for version in (1, 2, 3):
        update(sender, engine, version, nudge(make_weights(), seed=version))
    update(rounding_sender(), fresh, 3, nudge(make_weights(), seed=3))
    assert same_bits(engine.installer.tensors, fresh.installer.tensors)
