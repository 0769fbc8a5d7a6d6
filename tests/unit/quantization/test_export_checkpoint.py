"""Exported folders, read back with safetensors."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_decoders import tiny_decoder

from qurl.quantization import FORMATS, export, export_checkpoint

TIED = {"tie_word_embeddings": True, "hidden_size": 128, "intermediate_size": 128}


def read(folder) -> dict[str, torch.Tensor]:
    """All tensors, through the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, framework="pt") as shard:
            tensors[name] = shard.get_tensor(name)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    return tensors


@pytest.fixture
def source(tmp_path):
    """A saved bfloat16 Qwen2 with a tied head and a tokenizer file."""
    folder = tmp_path / "source"
    tiny_decoder("Qwen2", **TIED).bfloat16().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights in another layout")
    return folder


@pytest.mark.parametrize("name", [name for name, quantization in FORMATS.items() if quantization.scheme is not None])
def test_a_folder_is_exported_as_what_encode_gives_and_the_rest_as_it_was(source, tmp_path, name):
    targets = export_checkpoint(source, tmp_path / "out", FORMATS[name], ["1.mlp.down_proj"])
    before, after = load_file(source / "model.safetensors"), read(tmp_path / "out")
    assert len(targets) == 13 and "model.layers.1.mlp.down_proj" not in targets
    expected = {}
    for key, tensor in before.items():
        module = key.removesuffix(".weight")
        wire = {key.rpartition(".")[2]: tensor}
        if module in targets:
            wire = FORMATS[name].checkpoint_tensors(FORMATS[name].encode(tensor))
        prefix = key.rpartition(".")[0]
        expected |= {f"{prefix}.{suffix}": value for suffix, value in wire.items()}
    assert after.keys() == expected.keys()
    for key, tensor in expected.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key].float(), tensor.float()), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == FORMATS[name].compressed_tensors_config(["lm_head", "model.layers.1.mlp.down_proj"])
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["hidden_size"] == 128
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()


def test_a_model_in_memory_exports_like_its_folder(source, tmp_path):
    export_checkpoint(source, tmp_path / "a", FORMATS["int8"])
    export_checkpoint(tiny_decoder("Qwen2", **TIED).bfloat16(), tmp_path / "b", FORMATS["int8"])
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in "ab"]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0]["architectures"] == configs[1]["architectures"] and configs[0]["model_type"] == configs[1]["model_type"]


def test_full_precision_exports_an_ordinary_checkpoint(source, tmp_path):
    export_checkpoint(source, tmp_path / "out", FORMATS["none"])
    before, after = load_file(source / "model.safetensors"), read(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_large_models_are_written_and_read_in_shards(source, tmp_path, monkeypatch):
    export_checkpoint(source, tmp_path / "one", FORMATS["int8"])
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    export_checkpoint(source, tmp_path / "many", FORMATS["none"])
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    monkeypatch.undo()
    export_checkpoint(tmp_path / "many", tmp_path / "again", FORMATS["int8"])
    one, again = read(tmp_path / "one"), read(tmp_path / "again")
    assert one.keys() == again.keys() and all(torch.equal(one[key], again[key]) for key in one)


def test_sources_that_cannot_be_exported_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="no Hugging Face folder"):
        export_checkpoint(tmp_path / "absent", tmp_path / "out", FORMATS["int8"])
    with pytest.raises(ValueError, match="not an empty folder"):
        export_checkpoint(source, source, FORMATS["int8"])
    with pytest.raises(ValueError, match="compressed-tensors has no nvfp4"):
        export_checkpoint(source, tmp_path / "out", FORMATS["nvfp4"])
    with pytest.raises(ValueError, match="matches none"):
        export_checkpoint(source, tmp_path / "out", FORMATS["int8"], ["nothing"])
    with pytest.raises(ValueError, match="mixture of experts"):
        export_checkpoint(tiny_decoder("Mixtral", num_local_experts=2), tmp_path / "out", FORMATS["int8"])
    export_checkpoint(source, tmp_path / "int8", FORMATS["int8"])
    with pytest.raises(ValueError, match="quantized already"):
        export_checkpoint(tmp_path / "int8", tmp_path / "out", FORMATS["int8"])
    assert not (tmp_path / "out").exists()


def test_a_damaged_source_is_refused_in_words(source, tmp_path):
    index = source / "model.safetensors.index.json"
    for content in ("{}", "{", '{"weight_map": 3}'):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"index\.json is damaged"):
            export_checkpoint(source, tmp_path / "out", FORMATS["int8"])
    index.write_text('{"weight_map": {"a": "model-00001.safetensors"}}')
    with pytest.raises(ValueError, match=r"source is damaged: .*model-00001\.safetensors"):
        export_checkpoint(source, tmp_path / "out", FORMATS["int8"])
    index.unlink()
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="source is damaged: "):
        export_checkpoint(source, tmp_path / "out", FORMATS["int8"])
    assert not (tmp_path / "out").exists()


def test_a_weight_that_cannot_be_encoded_is_named_and_leaves_no_loadable_folder(source, tmp_path):
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight: .*NaN"):
        export_checkpoint(source, tmp_path / "out", FORMATS["fp8"])
    assert not (tmp_path / "out" / "config.json").exists()
