"""Encoded checkpoints: what is in them, what is refused, and that a killed process loses nothing."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qurl.ptq import QuantizeSettings, quantize_folder
from qurl.quantization import FORMATS, resolved_format

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A saved bfloat16 Qwen2 of three layers with a tied head and a tokenizer file."""
    folder = tmp_path_factory.mktemp("models") / "source"
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=101,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def tensors(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values())
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def digest(folder):
    """Of every file by its path."""
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*")) if file.is_file()}  # fmt: skip


@pytest.mark.parametrize(("name", "rotation"), [*((name, 0) for name in FORMATS if name != "none"), ("lobcq", 64)])
def test_a_checkpoint_holds_the_wire_tensors_and_states_their_bits(source, tmp_path, name, rotation):
    quantization = resolved_format(name, rotation=rotation)
    settings = QuantizeSettings(format=name, ignore=("1.mlp.down_proj",), rotation=rotation)
    report = quantize_folder(source, tmp_path / "out", settings)
    before, after = load_file(source / "model.safetensors"), tensors(tmp_path / "out")
    expected, bits, count = {}, 0, 0
    for key, tensor in before.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "weight" and module.endswith(MODULES) and module != "model.layers.1.mlp.down_proj":
            wire = quantization.encode(tensor)
            expected |= {f"{module}.{suffix}": part for suffix, part in wire.items()}
            bits += sum(8 * part.nbytes for part in wire.values())
            count += tensor.numel()
        else:
            expected[key] = tensor
    assert after.keys() == expected.keys()
    for key, tensor in expected.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key].float(), tensor.float()), key
    assert report.bits_on_disk == pytest.approx(bits / count) and report.bits_formula == pytest.approx(bits / count)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config.pop("codebooks", None) == quantization.codebooks_sha256
    expected = {"quant_method": "qurl", "format": name, "ignore": ["1.mlp.down_proj"], "encoded": True, "version": 1}
    assert config == (expected | {"rotation": rotation, "version": 2} if rotation else expected)
    if rotation:
        with pytest.raises(ValueError, match=r"holds a checkpoint of other arguments \(rotation: 64 there, 16 now\)"):
            quantize_folder(source, tmp_path / "out", replace(settings, rotation=16))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_the_report_names_the_worst_matrix_first(source, tmp_path):
    report = quantize_folder(source, tmp_path / "out", QuantizeSettings(format="int8"))
    weights = load_file(source / "model.safetensors")
    for matrix in report.matrices:
        weight = weights[f"{matrix.module}.weight"].double()
        noise = weight - FORMATS["int8"].decode(FORMATS["int8"].encode(weight.bfloat16())).double()
        assert matrix.relative_error == pytest.approx(float(noise.norm() / weight.norm()))
    errors = [matrix.relative_error for matrix in report.matrices]
    assert len(errors) == 21 and errors == sorted(errors, reverse=True)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["matrices"][0]["module"] == report.matrices[0].module


CHILD = """
import sys, time
from pathlib import Path
from qurl.ptq import QuantizeSettings, quantize_folder
slow = lambda done, total: time.sleep(0.05)
quantize_folder(Path(sys.argv[1]), Path(sys.argv[2]), QuantizeSettings(format="lobcq"), slow)
"""


def test_a_killed_process_is_continued_after_its_last_whole_layer(source, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(source), str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    records = out / ".unfinished"
    while len(list(records.glob("model-*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "config.json").exists()
    finished = {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors") if (records / f"{file.name}.json").exists()}
    assert 2 <= len(finished) < 4
    quantize_folder(source, out, QuantizeSettings(format="lobcq"))
    assert {file: file.stat().st_mtime_ns for file in finished} == finished  # not written again
    quantize_folder(source, whole, QuantizeSettings(format="lobcq"))
    assert digest(out) == digest(whole)


def test_a_finished_checkpoint_is_left_alone_and_one_of_other_arguments_is_refused(source, tmp_path):
    out = tmp_path / "out"
    report = quantize_folder(source, out, QuantizeSettings(format="int8"))
    before = digest(out)
    assert quantize_folder(source, out, QuantizeSettings(format="int8")) == report
    for settings in (QuantizeSettings(format="fp8"), QuantizeSettings(format="int8", ignore=("down_proj",))):
        with pytest.raises(ValueError, match="holds a checkpoint of other arguments"):
            quantize_folder(source, out, settings)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="name a new folder"):
        quantize_folder(source, tmp_path / "mine", QuantizeSettings(format="int8"))
    assert digest(out) == before and (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def spoil(source, folder, change):
    """A copy of the source with changed weights."""
    weights = load_file(source / "model.safetensors")
    change(weights)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


def test_weights_and_patterns_that_cannot_be_honoured_are_refused_before_anything_is_written(source, tmp_path):
    up = "model.layers.2.mlp.up_proj.weight"
    nan = spoil(source, tmp_path / "nan", lambda weights: weights[up].view(-1)[7:8].fill_(float("nan")))
    zero = spoil(source, tmp_path / "zero", lambda weights: weights[up].zero_())
    out = tmp_path / "out"
    cases = [
        (nan, {}, "up_proj.weight of the source holds NaN"),
        (zero, {}, "all zeros; .* give --ignore model.layers.2.mlp.up_proj"),
        (source, {"ignore": ("experts",)}, "matches none"),
        (source, {"ignore": ("q_proj",)}, "as one matrix; ignore all of them or none"),
        (tmp_path / "absent", {}, "no Hugging Face folder"),
    ]
    for folder, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            quantize_folder(folder, out, QuantizeSettings(format="nvfp4", **arguments))
        assert not out.exists()


def test_a_width_that_the_format_cannot_divide_is_named(tmp_path):
    config = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=101
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.\S+: .*needs a multiple of 128 input features, not (64|96).*--ignore"):
        quantize_folder(tmp_path / "source", tmp_path / "out", QuantizeSettings(format="int4"))
    assert not (tmp_path / "out").exists()
