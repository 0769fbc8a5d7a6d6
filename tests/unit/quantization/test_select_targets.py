"""Which modules a list of patterns leaves to quantize."""

import pytest

from qurl.quantization import select_targets

PARTS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [f"model.layers.{i}.{part}" for i in (0, 1, 10) for part in PARTS] + ["lm_head"]


def test_without_patterns_everything_but_the_head_is_quantized():
    assert select_targets(NAMES, []) == frozenset(NAMES) - {"lm_head"}
    assert select_targets(["a.up", "a.lm_head"], []) == {"a.up"}


@pytest.mark.parametrize(
    ("pattern", "ignored"),
    [
        ("model.layers.1.mlp.down_proj", {"model.layers.1.mlp.down_proj"}),
        ("1.mlp.down_proj", {"model.layers.1.mlp.down_proj"}),  # components, not characters: layer 10 keeps its code
        ("mlp.down_proj", {f"model.layers.{i}.mlp.down_proj" for i in (0, 1, 10)}),
        ("down_proj", {f"model.layers.{i}.mlp.down_proj" for i in (0, 1, 10)}),
        ("re:.*layers\\.1\\.", {n for n in NAMES if ".1." in n}),
        ("re:model.layers.1", {n for n in NAMES if ".1." in n or ".10." in n}),  # a regex matches from the start, to any end
        ("re:.*(up|down)_proj$", {n for n in NAMES if "mlp" in n}),
        ("lm_head", set()),
        ("re:.*lm_head", set()),
    ],
)
def test_a_pattern_takes_out_what_it_names(pattern, ignored):
    assert select_targets(NAMES, [pattern]) == frozenset(NAMES) - {"lm_head"} - ignored


def test_the_head_may_be_named_even_where_it_is_tied():
    assert select_targets(NAMES[:-1], ["lm_head"]) == frozenset(NAMES[:-1])


@pytest.mark.parametrize("pattern", ["proj", "model.layers.2", "model.layers.0.mlp", "re:layers", "re:^down_proj", "", "re:model$"])
def test_a_pattern_that_matches_nothing_raises(pattern):
    with pytest.raises(ValueError, match="quantization.ignore=.* matches none of the model's 10 linear layers"):
        select_targets(NAMES, ["mlp.up_proj", pattern])


def test_a_broken_regex_and_a_list_that_leaves_nothing_raise():
    with pytest.raises(ValueError, match="no valid regular expression"):
        select_targets(NAMES, ["re:("])
    with pytest.raises(ValueError, match="leaves none"):
        select_targets(NAMES, ["re:.*"])
    with pytest.raises(ValueError, match="the model has no linear layers .* but lm_head"):
        select_targets(["lm_head"], [])
