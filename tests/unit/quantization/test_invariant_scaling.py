"""Folding a constant into norms and the layers behind them."""

import copy

import pytest
import torch
from tiny_decoders import tiny_decoder, tokens
from torch import nn

from qurl.quantization import FORMATS, changed_codes, fold_invariant_scaling

FAMILIES = {
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 32},
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 8},
}


@pytest.mark.parametrize("s", [1.5, 2.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_and_only_the_named_weights_change(family, s):
    model = tiny_decoder(family, **FAMILIES[family])
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        logits = model(tokens()).logits
        changed = fold_invariant_scaling(model, s)
        folded_logits = model(tokens()).logits
    assert float(logits.abs().max()) > 1.0
    assert torch.allclose(folded_logits, logits, rtol=1e-5, atol=1e-5)  # float32 rounding of w/s through two layers

    norms = {f"model.layers.{i}.{norm}.weight" for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")}
    linears = {
        f"model.layers.{i}.{part}.weight"
        for i in (0, 1)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    }
    assert set(changed) == norms | linears and len(changed) == len(set(changed))
    for name, old in before.items():
        new = model.state_dict()[name]
        factor = s if name in norms else 1 / s if name in linears else 1.0
        assert torch.allclose(new, old * factor, rtol=1e-6, atol=0) if factor != 1.0 else torch.equal(new, old), name


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8_block"])
def test_codes_are_the_same_right_after_the_fold(name):
    model = tiny_decoder("Qwen2")
    before = {n: FORMATS[name].encode(p)["weight"] for n, p in model.named_parameters() if p.ndim == 2}
    folded_exactly = copy.deepcopy(model)
    fold_invariant_scaling(folded_exactly, 2.0)
    after = {n: FORMATS[name].encode(p)["weight"] for n, p in folded_exactly.named_parameters() if p.ndim == 2}
    assert changed_codes(before, after)[0] == 0
    fold_invariant_scaling(model, 1.5)
    after = {n: FORMATS[name].encode(p)["weight"] for n, p in model.named_parameters() if p.ndim == 2}
    changed, total = changed_codes(before, after)
    # w/1.5 is rounded, which flips a code only within 127 * 2^-23 of a tie: about one in 30,000
    assert changed <= 2e-4 * total


def test_a_step_of_fixed_size_moves_more_codes_after_the_fold():
    moved = {}
    for s in (1.0, 2.0):
        model = tiny_decoder("Llama")
        fold_invariant_scaling(model, s)
        weight = model.model.layers[0].mlp.up_proj.weight.detach()
        step = 1e-4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)).sign()
        moved[s] = changed_codes(FORMATS["int8"].encode(weight), FORMATS["int8"].encode(weight + step))[0]
    assert moved[2.0] / moved[1.0] == pytest.approx(2.0, rel=0.25)  # a few hundred flips: about 6 % noise on each count


@pytest.mark.parametrize("s", [0.0, -1.5, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_raises(s):
    with pytest.raises(ValueError, match="quantization.invariant_scale"):
        fold_invariant_scaling(tiny_decoder("Llama"), s)


@pytest.mark.parametrize(
    ("family", "changes", "found"),
    [
        ("Gemma", {"head_dim": 16}, "does not scale its output with its weight"),
        ("Gemma2", {"head_dim": 16}, "unknown parts"),
        ("Phi3", {}, "has no .*k_proj"),  # one fused qkv_proj
        ("Olmo2", {}, "has no .*input_layernorm"),
        ("Cohere", {}, "has no .*post_attention_layernorm"),  # attention and MLP share one norm
        ("StableLm", {}, "with a bias"),
        ("Mixtral", {"num_local_experts": 2}, "has no .*gate_proj"),
        ("GPTNeoX", {}, "has no .*self_attn"),
        ("Bloom", {}, "no list of decoder blocks"),
    ],
)
def test_other_architectures_are_refused_and_left_alone(family, changes, found):
    model = tiny_decoder(family, **changes)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=found) as caught:
        fold_invariant_scaling(model, 1.5)
    assert "quantization.update_awareness=none" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_block_that_does_not_fit_leaves_the_blocks_before_it_alone():
    model = tiny_decoder("Llama")
    model.model.layers[1].mlp.up_proj = nn.Bilinear(2, 2, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj is a Bilinear"):
        fold_invariant_scaling(model, 1.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_that_would_be_rounded_partitioned_or_scaled_twice_are_refused():
    with pytest.raises(ValueError, match=r"input_layernorm.weight is torch.bfloat16.*float32"):
        fold_invariant_scaling(tiny_decoder("Llama").bfloat16(), 1.5)
    partitioned = tiny_decoder("Llama")
    partitioned.model.layers[0].self_attn.q_proj.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="fold before DeepSpeed partitions"):
        fold_invariant_scaling(partitioned, 1.5)
    shared = tiny_decoder("Llama")
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="share weights"):
        fold_invariant_scaling(shared, 1.5)
