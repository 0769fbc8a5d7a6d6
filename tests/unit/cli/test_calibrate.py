"""`qurl calibrate`, and what takes its file: `qurl quantize --codebooks` and `qurl bench perplexity --formats lobcq:FILE`."""

import json
from dataclasses import replace

import pytest
import torch

from qurl.cli.main import main
from qurl.ptq import calibration
from qurl.ptq.calibration import ACTIVATIONS, WEIGHTS, Per, calibrated, model_blocks
from qurl.ptq.evaluation import Text, inputs_of, load_float32
from qurl.quantization import FORMATS, resolved_format, select_targets
from qurl.quantization.error_report import copy_error
from qurl.quantization.lobcq import Layout, load_codebooks
from qurl.quantization.lobcq.calibration import calibrate
from qurl.vllm_plugin import format_of

LAYOUT = ["--block", "4", "--array", "32", "--num-codebooks", "8"]
SMALL = Layout(block=4, array=32, num_codebooks=8)
LAYOUTS = {WEIGHTS: SMALL, ACTIVATIONS: SMALL}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """`tiny/` (a random model), `text.jsonl` and `books.json`, calibrated on the two."""
    from qurl.warmstart import make_tiny_model

    folder = tmp_path_factory.mktemp("workspace")
    make_tiny_model(folder / "tiny", hidden_size=64)
    rows = [{"problem": f"{a}+{b}=?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"} for a in range(2) for b in range(4)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["calibrate", f"{folder}/tiny", f"{folder}/books.json", "--text", f"{folder}/text.jsonl", *LAYOUT]) == 0
    return folder


@pytest.fixture(autouse=True)
def inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def test_a_checkpoint_and_a_row_of_the_table_have_the_layout_of_the_file(workspace, capsys):
    codebooks = load_codebooks(workspace / "books.json")
    assert codebooks.layout == SMALL
    command = json.loads((workspace / "books.json").read_text())["command"]
    assert command == (
        f"qurl calibrate {workspace}/tiny {workspace}/books.json --operands both --per universal --block 4 --array 32 "
        f"--num-codebooks 8 --codeword-bits 6 --rotation 0 --seed 0 --text {workspace}/text.jsonl --context 512"
    )
    assert main(["quantize", "tiny", "out", "--format", "lobcq_w4a16", "--codebooks", "books.json"]) == 0
    config = json.loads((workspace / "out" / "config.json").read_text())
    assert format_of(config["quantization_config"]).sets.universal_set == codebooks
    assert json.loads((workspace / "out" / "report.json").read_text())["settings"]["codebooks"] == codebooks.sha256
    bench = ["bench", "perplexity", "tiny", "--text", "text.jsonl", "--formats", "lobcq:books.json", "lobcq",
             "--relative-to", "lobcq:books.json", "--out", "table"]  # fmt: skip
    assert main(bench) == 0
    _, own, package = json.loads((workspace / "table" / "both.json").read_text())
    assert (own["format"], package["format"]) == ("lobcq:books", "lobcq") and own["increase_ratio"]["value"] == 1.0
    assert own["weight_nmse"] < 0.9 * package["weight_nmse"]  # shorter blocks and arrays, and this model's own numbers
    assert own["activation_nmse"] < 0.9 * package["activation_nmse"]


def test_blocks_are_the_numbers_of_weights_and_inputs_over_their_scales(workspace):
    text = Text(workspace / "tiny", [str(workspace / "text.jsonl")], None, 512)
    model = load_float32(workspace / "tiny")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    name = sorted(select_targets(list(linears), ()))[0]
    others = ["re:(?!" + name.replace(".", r"\.") + "$).*_proj"]
    found = model_blocks(workspace / "tiny", text, LAYOUTS, per=Per.operand, ignore=others, num_blocks=1 << 20)
    weights, activations = found["re:.*", WEIGHTS], found["re:.*", ACTIVATIONS]
    format = resolved_format("lobcq", codebooks=load_codebooks(workspace / "books.json").content)
    matrix = linears[name].weight.detach()
    wire = format.encode(matrix)
    scale = (wire["weight_scale"].float() / wire["weight_global_scale"]).repeat_interleave(SMALL.array, dim=1)
    assert matches(weights, matrix / scale)
    inputs = inputs_of(model, text.documents, [name], num_tokens=32)[name]
    scale = format.quantize_activations(inputs)[1].repeat_interleave(SMALL.array, dim=1)
    assert len(inputs) > 8 and matches(activations, inputs / scale)


def matches(blocks, rows):
    """Whether they are the same blocks, in any order; a float32 division apart. Compared by their numbers and their sums."""
    expected = rows.reshape(-1, SMALL.block)
    pairs = ((blocks.flatten(), expected.flatten()), (blocks.sum(dim=1), expected.sum(dim=1)))
    return blocks.shape == expected.shape and all(
        torch.allclose(found.sort().values, wanted.sort().values, rtol=1e-5, atol=1e-4) for found, wanted in pairs
    )


def test_each_layer_and_operand_gets_codebooks_of_its_own_numbers(workspace, capsys):
    some, wide = ["--ignore", "re:model.layers.1"], ["--activation-codeword-bits", "8"]
    assert main(["calibrate", "tiny", "sets.json", "--text", "text.jsonl", "--per", "layer_operand", *LAYOUT, *wide, *some]) == 0
    assert "weights: 4 sets of codebooks" in capsys.readouterr().out and not list(workspace.glob("sets.json.*"))
    format = resolved_format("lobcq", codebooks=json.loads((workspace / "sets.json").read_text()))
    patterns = dict(format.sets.layers)
    assert len(patterns) == 4 and r"re:model\.layers\.0\.self_attn\.(q_proj|k_proj|v_proj)$" in patterns
    text = Text(workspace / "tiny", ["text.jsonl"], None, 512)
    layouts = {WEIGHTS: SMALL, ACTIVATIONS: replace(SMALL, codeword_bits=8)}
    samples = model_blocks(workspace / "tiny", text, layouts, per=Per.layer_operand, ignore=some[1:])
    together = torch.cat([blocks * (31 / layouts[operand].largest) for (_, operand), blocks in samples.items()])
    universal = calibrate(together[torch.randperm(len(together), generator=torch.Generator().manual_seed(0))], SMALL)
    for operand, layout in layouts.items():  # from the universal set on, its error falls
        pattern = "model.layers.0.self_attn.o_proj"
        found = calibrate(samples[pattern, operand], layout, start=universal.codebooks)
        assert getattr(patterns[pattern], operand) == found.codebooks and found.rounded_objective < found.objective[0]
    assert main(["quantize", "tiny", "layered", "--format", "lobcq", "--codebooks", "sets.json", *some]) == 0
    config, report = (json.loads((workspace / "layered" / name).read_text()) for name in ("config.json", "report.json"))
    assert format_of(config["quantization_config"]).sets == format.sets
    numbers = sum(rows * columns for rows, columns in (matrix["shape"] for matrix in report["matrices"]))
    assert (report["bits_formula"] - report["bits_on_disk"]) * numbers == pytest.approx(4 * 8 * 16 * 6)
    formats = ["--formats", "lobcq:books.json", "lobcq:sets.json"]
    assert main(["bench", "perplexity", "tiny", "--text", "text.jsonl", *formats, "--out", "by", *some]) == 0
    _, universal, own = json.loads((workspace / "by" / "both.json").read_text())
    assert own["weight_nmse"] < universal["weight_nmse"] and own["activation_nmse"] < 0.9 * universal["activation_nmse"]
    assert (own["bits_per_weight"] - universal["bits_per_weight"]) * numbers == pytest.approx(3 * 8 * 16 * 6)


def test_a_killed_calibration_goes_on_and_ends_in_the_same_codebooks(workspace, monkeypatch):
    journal, calls = workspace / "killed.unfinished", []

    def stopped(done, total):
        if done == 1:
            raise KeyboardInterrupt

    def counted(*arguments, start=None):
        calls.extend([arguments] if start else [])
        return calibrate(*arguments, start=start)

    monkeypatch.setattr(calibration, "calibrate", counted)
    question = {"per": Per.layer, "ignore": ("re:model.layers.1", "down_proj"), "seed": 1}
    with pytest.raises(KeyboardInterrupt):
        calibrated(workspace / "tiny", None, LAYOUTS, journal, progress=stopped, **question)
    with journal.open("a") as file:
        file.write('{"document": "half a li')
    whole = calibrated(workspace / "tiny", None, LAYOUTS, workspace / "whole.unfinished", **question)
    assert len(calls) == 1 + 3
    assert calibrated(workspace / "tiny", None, LAYOUTS, journal, **question) == whole
    assert len(calls) == 1 + 3 + 2
    calibrated(workspace / "tiny", None, LAYOUTS, journal, **question | {"seed": 2})
    assert len(calls) == 1 + 3 + 2 + 3  # what was found with another seed is no part of it
    assert all(codebooks.weights == codebooks.activations for _, codebooks in whole[0].layers)


def test_one_operand_alone_gives_it_the_smaller_error(workspace):
    errors = {}
    for operands in ("weights", "activations"):
        text = [] if operands == "weights" else ["--text", "text.jsonl"]
        assert main(["calibrate", "tiny", f"{operands}.json", "--operands", operands, *text, *LAYOUT]) == 0
        format = resolved_format("lobcq", codebooks=json.loads((workspace / f"{operands}.json").read_text()))
        weight = load_float32(workspace / "tiny").get_parameter("model.layers.0.mlp.down_proj.weight").detach()
        errors[operands] = copy_error("", weight, format.decode(format.encode(weight))).relative_error
    assert errors["weights"] < errors["activations"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["calibrate", "tiny", "x.json"], "--operands both needs --text"),
        (["calibrate", "tiny", "x.json", "--operands", "weights", "--text", "text.jsonl"], "--operands weights reads no --text"),
        (["calibrate", "tiny", "books.json", "--operands", "weights"], "books.json exists"),
        (["calibrate", "/nowhere", "x.json", "--operands", "weights"], "/nowhere is no Hugging Face folder"),
        (["calibrate", "tiny", "x.json", "--operands", "weights", "--block", "3"], "LO-BCQ with block=3: use one of 2, 4, 8"),
        (["calibrate", "tiny", "x.json", "--operands", "weights", "--array", "128"], "--array 128 does not divide its 192 input"),
        (["calibrate", "tiny", "x.json", "--operands", "weights", "--rotation", "128"], "--rotation 128 does not divide its 192"),
        (["calibrate", "tiny", "x.json", "--operands", "weights", "--rotation", "8"], "--rotation 8 is no size of a block; use 0"),
        (["quantize", "tiny", "x", "--format", "int8", "--rotation", "16"], "--rotation 16 needs a format whose scales belong to"),
        (["quantize", "tiny", "x", "--format", "lobcq", "--rotation", "128"], "--rotation 128 needs a multiple of 128 input"),
        (["bench", "perplexity", "tiny", "--text", "text.jsonl", "--formats", "lobcq@17", "--out", "y"], "rotation=17 is no size"),
        (["calibrate", "tiny", "x.json", "--operands", "weights", "--per", "operand"], "--per operand is for both operands, not"),
        (["calibrate", "tiny", "x.json", "--operands", "weights", "--activation-codeword-bits", "8"], "needs --per operand"),
        (["quantize", "tiny", "x", "--format", "int8", "--codebooks", "books.json"], "--codebooks books.json needs --format lobcq"),
        (["quantize", "tiny", "x", "--format", "lobcq_int8", "--codebooks", "books.json"], "--codebooks books.json has codewords"),
        (["quantize", "tiny", "x", "--format", "lobcq", "--codebooks", "none.json"], "--codebooks=none.json cannot be read"),
        (["bench", "perplexity", "tiny", "--text", "text.jsonl", "--formats", "int8:books.json", "--out", "y"], "needs quant"),
    ],
)
def test_what_cannot_be_done_is_one_line(argv, told, capsys):
    assert main(argv) == 2
    assert told in capsys.readouterr().err


def test_frozen_codebooks_stay_the_default(workspace):
    assert resolved_format("lobcq") is FORMATS["lobcq"]
