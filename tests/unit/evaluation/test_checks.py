"""What `qurl eval` refuses before Ray or vLLM start, in the words of its own options."""

from __future__ import annotations

import json
import re

import pytest

from qurl.cli.main import main
from qurl.evaluation.config import EvalConfig
from qurl.evaluation.evaluate import check_length
from qurl.warmstart.model import make_tiny_model

KEY_OF_A_RUN = re.compile(r"\b(data|quantization|reward|rollout)\.[a-z_]+|\bmodel\.(path|tokenizer|max)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluation")
    make_tiny_model(path / "tiny")
    rows = [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(3)]
    files = {"sums": rows, "long": [rows[0], {**rows[1], "question": "1" * 300}], "wordy": [*rows, {**rows[0], "answer": "four"}]}
    for name, content in files.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (path / "layers.yaml").write_text("down_proj: k9-w1-a1\n")
    (path / "parts.yaml").write_text("q_proj: k4-w1-a2\n")
    return path


@pytest.mark.parametrize(
    ("file", "options", "told"),
    [
        ("sums", ["--max-tokens", "3000"], "use --max-tokens 19"),
        ("long", ["--max-prompt-tokens", "256"], "--data gsm8k line 2: the prompt has 3"),
        ("wordy", [], "--reward='gsm8k' fails on problem r000003"),
        ("sums", ["--prompt", "{problem} {level}"], "--prompt='{problem} {level}': KeyError"),
        ("sums", ["--tensor-parallel-size", "3"], "--tensor-parallel-size=3 does not divide the model's 2"),
        ("sums", ["--format", "int8", "--ignore", "mlp.upproj"], "mlp.upproj"),
        ("sums", ["--format", "axbxp", "--precision", "k9-w1-a1"], "--precision='k9-w1-a1': blocks of 9 bits do not exist; use k1"),
        ("sums", ["--format", "axbxp", "--precision", "layers.yaml"], "--precision='k9-w1-a1': blocks of 9 bits do not exist; use"),
        ("sums", ["--format", "axbxp", "--precision", "parts.yaml"], "different settings (model.layers.0.self_attn.k"),
        ("sums", ["--format", "axbxp", "--precision", "absent.yaml"], "--precision=absent.yaml cannot be read"),
        ("sums", ["--format", "int8", "--precision", "k4-w1-a1"], "--precision needs --format axbxp, and int8 is given"),
        ("sums", ["--engine-arg", "max_num_seq=4"], "--engine-arg max_num_seq is no argument of vLLM's engine; did you"),
        ("sums", ["--engine-arg", "seed=4"], "--engine-arg seed is set by qurl itself"),
        ("sums", ["--engine-arg", "max_model_len=20"], "--engine-arg max_model_len=20 is shorter"),
        ("sums", ["--data", "gsm8k=long.jsonl"], "--data gsm8k is given twice"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_one_line_that_names_the_option(folder, monkeypatch, capsys, file, options, told):
    monkeypatch.chdir(folder)
    arguments = ["eval", "tiny", "--benchmarks", "gsm8k", "--data", f"gsm8k={file}.jsonl", "--max-tokens", "100"]
    assert main([*arguments, *options]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not KEY_OF_A_RUN.search(error), error
    assert not (folder / "evals").exists()


def test_a_prompt_and_its_response_fit_the_model():
    config = EvalConfig(model="m", benchmarks=["amc23"], max_tokens=100)
    check_length(config, 28, 128)
    check_length(config, 28, None)
    with pytest.raises(ValueError, match="of 29 tokens, exceeds the model's 128 positions; use --max-tokens 99"):
        check_length(config, 29, 128)
    with pytest.raises(ValueError, match="use a model with more"):
        check_length(config, 128, 128)
