"""Models from scratch load again and depend on their seed alone."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from qurl.warmstart import make_tiny_model, model_config, train_tokenizer

IDS = torch.tensor([[3, 70, 99, 260]])


def logits(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_a_seed_determines_the_saved_model_and_leaves_the_global_random_state(tmp_path, architecture):
    state = torch.get_rng_state()
    first, again, other = (
        make_tiny_model(tmp_path / name, architecture=architecture, seed=seed) for name, seed in [("a", 1), ("b", 1), ("c", 2)]
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert AutoConfig.from_pretrained(first).model_type == architecture
    assert torch.equal(logits(first), logits(again))
    assert not torch.allclose(logits(first), logits(other))


def test_tied_embeddings_are_one_matrix_after_loading(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path, tie_word_embeddings=True))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_norms_and_biases_are_not_trivial(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path))
    vectors = {name: p for name, p in model.named_parameters() if p.dim() == 1}
    assert any("bias" in name for name in vectors)
    assert all(p.std() > 0.01 for p in vectors.values())


def test_generation_defaults_sample_the_plain_distribution_and_stop_at_the_end_token(tmp_path):
    path = make_tiny_model(tmp_path, chat=True)
    defaults = GenerationConfig.from_pretrained(path)
    assert defaults.eos_token_id == AutoConfig.from_pretrained(path).eos_token_id == 2
    assert defaults.temperature is None and defaults.top_k is None and defaults.top_p is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "gpt2"}, "use one of llama, qwen2, qwen3"),
        ({"hidden_size": 48}, "no multiple of the head size 32"),
        ({"hidden_size": 128, "num_kv_heads": 3}, "does not divide the 4 heads"),
    ],
)
def test_impossible_shapes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_config(train_tokenizer(["a"], 320), **arguments)
