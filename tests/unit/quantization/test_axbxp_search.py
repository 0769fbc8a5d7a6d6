"""What a precision costs, and the search for cheap ones, with losses that are written out here."""

import itertools
import math

import pytest

from qurl.quantization import FORMATS
from qurl.quantization.axbxp import parse, with_precision
from qurl.quantization.axbxp.cost import cost, network_cost
from qurl.quantization.axbxp.search import cheapest, describe, engine_matrices, ladder, last_within

CANDIDATES = [parse(setting) for setting in ("k2-w4-a4", "k2-w2g16-a2g1", "k2-w3g16-a3g1", "k2-w2g16-a3g1")]
WEIGHTS = {"first": 100.0, "middle": 300.0, "last": 100.0}
SENSITIVITY = {"first": 5.0, "middle": 1.0, "last": 2.0}


class Loss:
    """Each layer adds its sensitivity times what its operands lost, `steeper` times a fourth for a bit; counts its calls."""

    def __init__(self, steeper=1.0):
        self.calls, self.per_bit = 0, 4.0 * steeper

    def __call__(self, layers):
        self.calls += 1
        return sum(
            SENSITIVITY[name] * weight * self.per_bit ** (p.block_bits * (2 - kept.blocks))
            for name, p in layers.items() for weight, kept in ((1.0, p.weight), (3.0, p.activation)) if kept.blocks < p.num_blocks
        )  # fmt: skip


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


def blocks(precision):
    return precision.weight.blocks, precision.activation.blocks


def products(layers):
    return sum(WEIGHTS[name] * math.prod(blocks(precision)) for name, precision in layers.items())


@pytest.mark.parametrize("steeper", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("network", ["k1-w3g16-a4g1", "k2-w2g16-a3g1", "k2-w4-a4", "k4-w1-a2"])
def test_a_ladder_gets_cheaper_rung_by_rung_and_ends_within_the_bound(network, steeper):
    network = parse(network)
    loss = Loss(steeper)
    first = loss(dict.fromkeys(WEIGHTS, network))
    for bound in (1.001 * first, first + 1, 3 * first + 20):
        rungs = ladder(WEIGHTS, loss, bound, network)
        assert rungs[0] == dict.fromkeys(WEIGHTS, network) and loss(rungs[-1]) <= bound
        costs = [network_cost(rung, WEIGHTS).products for rung in rungs]
        assert all(after < before for before, after in itertools.pairwise(costs))


def test_every_rung_is_the_cheapest_of_all_precisions_that_lose_no_more():
    loss, pairs = Loss(), list(itertools.product(range(1, 5), repeat=2))
    kept = {(w, a): parse(f"k2-w{w}{'g16' if w < 4 else ''}-a{a}{'g1' if a < 4 else ''}") for w, a in pairs}
    everything = []
    for assigned in itertools.product(pairs, repeat=len(WEIGHTS)):
        layers = dict(zip(WEIGHTS, (kept[pair] for pair in assigned), strict=True))
        everything.append((loss(layers), products(layers)))
    for bound in (12, 40, 100, 300):
        _, *rungs = ladder(WEIGHTS, loss, bound, parse("k2-w2g16-a3g1"))
        assert rungs
        for rung in rungs:
            assert products(rung) == min(price for other, price in everything if other <= loss(rung))


def test_an_operand_is_measured_once_and_again_only_where_fewer_blocks_than_that_are_used():
    loss = Loss()
    rungs = ladder(WEIGHTS, loss, 17.0, parse("k1-w3g16-a4g1"))
    fewer = sum(max(0, 2 - w) + max(0, 3 - a) for w, a in map(blocks, rungs[-1].values()))
    assert loss.calls == 1 + 2 * len(WEIGHTS) + fewer + 1 and fewer > 0  # whole; each; those; the end of the ladder


def test_the_layer_that_matters_least_gives_up_most_and_one_that_matters_gets_blocks_back():
    network = parse("k1-w3g16-a4g1")
    end = ladder(WEIGHTS, Loss(), Loss()(dict.fromkeys(WEIGHTS, network)), network)[-1]
    assert cost(end["middle"]).products < cost(network).products < cost(end["first"]).products


def test_a_loss_that_is_no_number_is_never_accepted():
    def loss(layers):
        return math.nan if any(p.weight.blocks < 3 for p in layers.values()) else 0.0

    for layers in ladder(WEIGHTS, loss, 1.0, parse("k2-w3g16-a3g1")):
        assert not math.isnan(loss(layers))
    assert all(precision.activation.blocks == 1 for precision in layers.values())


def test_the_network_gets_the_cheapest_candidate_within_the_bound():
    for bound in (12, 60, 100, 1e4):
        meets = [p for p in CANDIDATES if Loss()(dict.fromkeys(WEIGHTS, p)) <= bound]
        assert cheapest(CANDIDATES, WEIGHTS, Loss(), bound) == min(meets, key=lambda p: cost(p).products)
    with pytest.raises(ValueError, match="none of 3 precisions meets bound=0.1; the best, k2-w3g16-a3g1, has 2"):
        cheapest(CANDIDATES[1:], WEIGHTS, Loss(), 0.1)


def test_bisection_finds_the_last_that_is_within_and_asks_for_the_end_first():
    for last, highest in itertools.combinations_with_replacement(range(20, -1, -1), 2):
        asked = []

        def is_within(index, asked=asked, highest=highest):
            asked.append(index)
            return index <= highest

        assert last_within(is_within, last) == highest
        assert asked[:1] == [last][: last > 0] and 0 not in asked
        assert len(asked) <= 1 + math.ceil(math.log2(last + 1))


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
