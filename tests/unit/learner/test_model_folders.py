"""A model folder that is not whole is refused; transformers would fill it up with random numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qurl.config import ModelConfig
from qurl.errors import ConfigError
from qurl.learner.huggingface import check_weight_files, load_model

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def folder(tmp_path):
    from qurl.warmstart.model import make_tiny_model

    make_tiny_model(tmp_path, seed=0)
    return tmp_path


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_whole_folder_loads(folder):
    check_weight_files(ModelConfig(path=str(folder)))
    assert load_model(ModelConfig(path=str(folder))).dtype is torch.float32


def test_a_tied_head_is_not_missing(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=40, tie_word_embeddings=True, **shape)).save_pretrained(tmp_path)
    model = load_model(ModelConfig(path=str(tmp_path)))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weights: weights.pop(NORM), f"{NORM} is missing; give a complete checkpoint"),
        (lambda weights: weights[NORM].fill_(float("nan")), f"{NORM} is not finite"),
        (lambda weights: weights.update({NORM: torch.ones(3)}), f"{NORM} has shape \\(3,\\), config.json says \\(64,\\)"),
    ],
)
def test_a_weight_that_is_missing_misshapen_or_not_finite_is_refused_by_name(folder, change, told):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=told):
        load_model(ModelConfig(path=str(folder)))


def test_another_model_s_configuration_tells_how_many_weights_do_not_fit(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    with pytest.raises(ValueError, match="has shape .*and [0-9]+ more"):
        load_model(ModelConfig(path=str(folder)))


def test_a_file_that_is_cut_short_or_not_there_is_found_without_reading_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        check_weight_files(ModelConfig(path=str(folder)))
    file.unlink()
    with pytest.raises(ConfigError, match="has no weights"):
        check_weight_files(ModelConfig(path=str(folder)))
    check_weight_files(ModelConfig(path="Qwen/Qwen2.5-0.5B"))  # a hub name: not here yet


def test_weights_of_another_shape_are_found_without_reading_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(ConfigError, match=r"in model\.safetensors has shape \(320, 64\), config.json says \(100, 64\)"):
        check_weight_files(ModelConfig(path=str(folder)))


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}', r"two\.safetensors is missing \(of 2 files"),
        ('{"weight_map": {}}', "no file is named"),
        ("{}", "index.json is damaged"),
        ("{", "index.json is damaged"),
    ],
)
def test_a_shard_that_the_index_names_must_be_there(folder, index, told):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match=told):
        check_weight_files(ModelConfig(path=str(folder)))
