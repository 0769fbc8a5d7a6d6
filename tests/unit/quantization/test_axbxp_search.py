"""What a precision costs, and the search for cheap ones, with losses that are written out here."""

import json
import math

import pytest

from qurl.quantization import FORMATS
from qurl.quantization.axbxp import all_precisions, parse, with_precision
from qurl.quantization.axbxp.cost import cost, network_cost
from qurl.quantization.axbxp.search import cheaper, describe, engine_matrices, search

CANDIDATES = [parse(setting) for setting in ("k2-w4-a4", "k2-w2g16-a2g1", "k2-w3g16-a3g1", "k2-w2g16-a3g1")]
WEIGHTS = {"first": 100.0, "middle": 300.0, "last": 100.0}
SENSITIVITY = {"first": 5.0, "middle": 1.0, "last": 2.0}


class Loss:
    """Each layer adds its sensitivity times what its operands lost; counts its calls."""

    def __init__(self, limit=math.inf):
        self.calls, self.limit = 0, limit

    def __call__(self, layers):
        self.calls += 1
        if self.calls > self.limit:
            raise KeyboardInterrupt
        return sum(
            SENSITIVITY[name] * (4.0 ** (3 - p.weight.blocks) + 2.0 ** (3 - p.activation.blocks)) for name, p in layers.items()
        )


@pytest.mark.parametrize(("setting", "products", "weight_bits"), [
    ("k4-w1-a1-balanced", 0.25, 4), ("k4-w1-a2", 0.5, 4), ("k4-w2-a2-noll", 0.75, 8), ("k4-w2-a2", 1, 8), ("k2-w3-a3", 0.5625, 6),
    ("k2-w2g1-a2g1", 0.25, 7), ("k1-w3g16-a7", 21 / 64, 4.1875), ("k2-w2g16-a4", 0.5, 5.125), ("k2-w3g16-a4", 0.75, 7.0625),
    ("k1-w4g1-a4g1", 0.25, 7), ("k2-w4-a4", 1, 8),
])  # fmt: skip
def test_costs_are_counts_of_blocks_and_bits(setting, products, weight_bits):
    found = cost(parse(setting))
    assert (found.products, found.weight_bits) == (products, weight_bits)


@pytest.mark.parametrize("name", ["axbxp_k2l2", "axbxp_k1l3"])
def test_stored_bits_are_those_of_the_wire_without_the_scales(name):
    assert FORMATS[name].bits_per_weight((64, 4096)) - 32 / 4096 == cost(FORMATS[name].precision).weight_bits


def test_gains_are_one_for_int8_and_grow_as_blocks_are_dropped():
    whole, less = cost(parse("k2-w4-a4")), cost(parse("k2-w2g16-a3g1"))
    assert whole.energy_gain(0.3) == whole.performance_gain(True) == whole.performance_gain(False) == 1
    assert less.energy_gain(1.0) == less.performance_gain(False) == 1 / less.products > less.energy_gain(0.0) > 1
    assert less.performance_gain(True) == pytest.approx(8 / 5.125)
    with pytest.raises(ValueError, match="compute_share=2"):
        whole.energy_gain(2)


def test_a_network_costs_the_mean_over_its_weights():
    layers = {"first": parse("k2-w4-a4"), "middle": parse("k2-w2g1-a2g1"), "last": parse("k2-w4-a4")}
    assert network_cost(layers, WEIGHTS).products == pytest.approx((100 + 300 * 0.25 + 100) / 500)


@pytest.mark.parametrize("bound", [12, 17, 25, 40, 80])
def test_a_search_never_passes_the_bound_nor_gets_dearer(bound):
    loss = Loss()
    found = search(WEIGHTS, loss, bound, CANDIDATES)
    meets = [p for p in CANDIDATES if Loss()(dict.fromkeys(WEIGHTS, p)) <= bound]
    assert found.network == min(meets, key=lambda p: cost(p).products) and found.network_loss <= bound
    assert found.loss == Loss()(found.layers) <= bound
    assert found.cost == pytest.approx(network_cost(found.layers, WEIGHTS).products)
    costs = [found.network_cost, *(step.cost for step in found.steps)]
    assert all(after < before for before, after in zip(costs, costs[1:], strict=False)) and found.cost == costs[-1]
    assert all(step.loss <= bound for step in found.steps)
    assert found.num_evaluations == loss.calls
    for name, precision in found.layers.items():  # no single step is left that would fit
        assert all(Loss()({**found.layers, name: less}) > bound for less in cheaper(precision))


def test_the_layer_that_matters_least_gives_up_most():
    found = search(WEIGHTS, Loss(), 17, CANDIDATES)
    assert cost(found.layers["middle"]).products < cost(found.layers["first"]).products
    assert found.steps[0].layer == "middle" and found.cost < found.network_cost


def test_a_search_goes_on_where_another_with_its_journal_ended():
    journal = {}
    with pytest.raises(KeyboardInterrupt):
        search(WEIGHTS, Loss(limit=6), 25, CANDIDATES, journal=journal)
    journal = json.loads(json.dumps(journal))
    assert len(journal) == 6
    loss = Loss()
    found = search(WEIGHTS, loss, 25, CANDIDATES, journal=journal)
    alone = search(WEIGHTS, Loss(), 25, CANDIDATES)
    assert (found.layers, found.steps) == (alone.layers, alone.steps) and loss.calls == alone.num_evaluations - 6


def test_a_loss_that_is_no_number_is_never_accepted():
    def loss(layers):
        return math.nan if any(p.weight.blocks < 3 for p in layers.values()) else 0.0

    found = search(WEIGHTS, loss, 1.0, CANDIDATES)
    assert all(p.weight.blocks == 3 and p.activation.blocks == 1 for p in found.layers.values())


def test_what_cannot_be_searched_is_said():
    with pytest.raises(ValueError, match="none of 4 precisions meets bound=1; the best, k2-w4-a4, has 6"):
        search(WEIGHTS, Loss(), 1, CANDIDATES)
    with pytest.raises(ValueError, match="needs layers and candidates; got 3 and 0"):
        search(WEIGHTS, Loss(), 1, [])


def test_stored_bits_may_be_what_is_made_small():
    found = search(WEIGHTS, Loss(), 40, all_precisions(block_bits=(2,)), objective=lambda each: each.weight_bits)
    assert found.cost < 6 and all(p.activation.blocks == 4 or p == found.network for p in found.layers.values())


def test_matrices_of_an_engine_get_one_setting_each():
    names = [f"model.layers.{i}.{leaf}" for i in (1, 10) for leaf in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj",
    )]  # fmt: skip
    matrices = engine_matrices(dict.fromkeys(names, 10.0))
    assert list(matrices.values()) == [30, 10, 20, 10] * 2
    settings = {pattern: f"k2-w{1 + i % 3}g16-a4" for i, pattern in enumerate(matrices)}
    format = with_precision(FORMATS["axbxp"], settings, names)
    found = [str(format.of_layer(name).precision) for name in names]
    own = list(settings.values())
    assert found == [own[i] for i in (0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 5, 6, 6, 7)]
    assert describe({"a": parse("k4-w1-a2"), "b": parse("k4-w1-a2")}) == "k4-w1-a2"
