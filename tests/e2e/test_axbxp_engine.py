"""Ax-BxP in vLLM's engine: per layer, switched while it lives, then updated. Correctness is equality with a fresh engine."""

import pytest
import torch
from test_vllm_plugin_engine import SMALL, cheap_garbage_collection, checkpoints, engine, generate, install, wire_tensors  # noqa: F401

from qurl.bench.switch_child import sample, switch_in_turns
from qurl.quantization import FORMATS, with_precision
from qurl.vllm_plugin import engine_args
from qurl.vllm_plugin.axbxp import switch_precision
from qurl.vllm_plugin.transfer import read_back

pytestmark = pytest.mark.e2e

BY_LAYER = {"re:model.layers.0.self_attn.(q|k|v)_proj": "k4-w1-a2", "down_proj": "k4-w2-a2-noll", "re:.*": "k2-w2g8-a2g16"}
OWN = "k2-w2g16-a3g1"  # of the format
NAMES = [f"model.layers.{i}.{name}" for i in range(2) for name in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
)]  # fmt: skip


def axbxp(precision=None):
    return engine_args("axbxp", precision=precision)


def test_a_switched_engine_equals_one_started_with_the_precision(checkpoints):  # noqa: F811
    dtype = torch.bfloat16
    old, _ = checkpoints("Qwen2", True, dtype, 0)
    new, parameters = checkpoints("Qwen2", True, dtype, 1)
    with engine(old, dtype, **axbxp()) as running, engine(old, dtype, **axbxp(BY_LAYER)) as fresh:
        at_start = generate(running)
        sampled = sample(running.llm.llm_engine)
        _, equal = switch_in_turns(running.llm.llm_engine, ["k2-w4-a4", OWN], 2, {OWN: sampled, "k2-w4-a4": sampled})
        assert equal == {OWN: [True, True], "k2-w4-a4": [False, False]}
        assert switch_precision(running.llm, BY_LAYER) > 0
        switched = generate(running)
        assert switched == generate(fresh) != at_start
        switch_precision(running.llm, "k2-w4-a4")
        assert generate(running) not in (at_start, switched)
        switch_precision(running.llm, None)
        assert generate(running) == at_start
        switch_precision(running.llm, BY_LAYER)
        assert generate(running) == switched
        for each in (running, fresh):
            install(each, wire_tensors(parameters, "int8"))  # the wire is int8's
        updated = generate(running)
        assert updated == generate(fresh) != switched
        format = with_precision(FORMATS["axbxp"], BY_LAYER, NAMES)
        held = running.llm.collective_rpc(read_back, args=(NAMES,))[0]
        for name in NAMES:
            wire = FORMATS["axbxp"].encode(parameters[f"{name}.weight"])
            assert torch.equal(held[name], format.of_layer(name).decode(wire))
        switch_precision(running.llm, None)
        with engine(new, dtype, **axbxp()) as fresh_on_new:
            assert generate(running) == generate(fresh_on_new)


def test_layers_compute_what_the_format_says_and_a_wrong_switch_changes_nothing(checkpoints):  # noqa: F811
    folder, parameters = checkpoints("Qwen2", False, torch.float32, 0)
    x = torch.randn(7, SMALL["hidden_size"], generator=torch.Generator().manual_seed(0))
    format = with_precision(FORMATS["axbxp"], BY_LAYER, NAMES)
    with engine(folder, torch.float32, **axbxp(BY_LAYER)) as running:
        for index, layer in enumerate(running.model.model.layers):
            fused_layers = ((layer.self_attn.qkv_proj, "self_attn", "qkv"), (layer.mlp.gate_up_proj, "mlp", ("gate", "up")))
            for fused, parent, parts in fused_layers:
                names = [f"model.layers.{index}.{parent}.{part}_proj" for part in parts]
                expected = [
                    format.of_layer(name).linear(x, format.encode(parameters[f"{name}.weight"]), parameters.get(f"{name}.bias"))
                    for name in names
                ]
                # float32: only the order of the last three roundings differs
                torch.testing.assert_close(fused(x)[0], torch.cat(expected, dim=-1), rtol=1e-6, atol=1e-5)
        before = generate(running)
        for wrong, message in (
            ("k2", "is no setting"), ({"up_proj": "k4-w1-a2"}, "all the same"), ({"lm_head": "k4-w1-a2"}, "matches none"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                switch_precision(running.llm, wrong)
        assert generate(running) == before


def test_a_precision_that_cannot_be_honoured_stops_the_start(checkpoints):  # noqa: F811
    folder = checkpoints("Qwen2", True, torch.float32, 0)[0]
    with pytest.raises(ValueError, match="all the same"), engine(folder, torch.float32, **axbxp({"q_proj": "k4-w1-a2"})):
        pass


def test_an_engine_of_a_packed_format_takes_updates_and_multiplies_what_came(checkpoints):  # noqa: F811
    format = "axbxp_k2l2"
    old, _ = checkpoints("Qwen2", True, torch.bfloat16, 0)
    new, parameters = checkpoints("Qwen2", True, torch.bfloat16, 1)
    with engine(old, torch.bfloat16, **engine_args(format)) as updated, engine(new, torch.bfloat16, **engine_args(format)) as fresh:
        install(updated, wire_tensors(parameters, format))
        assert generate(updated) == generate(fresh)
        held = updated.llm.collective_rpc(read_back, args=(NAMES,))[0]
        for name in NAMES:
            assert torch.equal(held[name], FORMATS[format].decode(FORMATS[format].encode(parameters[f"{name}.weight"])))
        with pytest.raises(ValueError, match="needs an engine with quantization=axbxp"):
            switch_precision(updated.llm, "k4-w1-a2")
