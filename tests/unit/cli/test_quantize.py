"""`qurl quantize` and `qurl bench perplexity` on a tiny model, through main(argv)."""

import json
import shutil
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qurl.cli.main import main
from qurl.data.documents import load_documents
from qurl.quantization.lobcq.codebook_sets import codebook_sets_of
from qurl.vllm_plugin import format_of


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """`tiny/` (a random model) and `text.jsonl`."""
    from qurl.warmstart import make_tiny_model

    folder = tmp_path_factory.mktemp("workspace")
    make_tiny_model(folder / "tiny", hidden_size=128)
    rows = [{"problem": f"{a}+{b}=?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"} for a in range(3) for b in range(4)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def test_both_commands_measure_the_same_and_a_second_call_changes_nothing(workspace, capsys):
    quantize = ["quantize", "tiny", "out", "--format", "nvfp4", "--text", "text.jsonl", "--max-documents", "10"]
    assert main(quantize) == 0
    told = capsys.readouterr().out
    assert "bits per weight: 4.50" in told and "10 documents" in told
    report = json.loads((workspace / "out" / "report.json").read_text())
    assert main(quantize) == 0
    assert json.loads((workspace / "out" / "report.json").read_text()) == report
    bench = ["bench", "perplexity", "tiny", "--text", "text.jsonl", "--max-documents", "10", "--formats", "lobcq", "nvfp4",
             "--relative-to", "nvfp4", "--out", "table"]  # fmt: skip
    assert main(bench) == 0
    none, lobcq, nvfp4 = json.loads((workspace / "table" / "both.json").read_text())
    assert [none["format"], lobcq["format"], nvfp4["format"]] == ["none", "lobcq", "nvfp4"]
    found = report["perplexity"]
    assert none["perplexity"] == pytest.approx(found["before"]) and nvfp4["perplexity"] == pytest.approx(found["after"])
    assert nvfp4["increase"] == pytest.approx(found["increase"]) and none["increase"] == 0.0
    assert nvfp4["increase_ratio"]["value"] == 1.0
    assert 0.0 < lobcq["divergence"] < 0.8 * nvfp4["divergence"]
    assert lobcq["divergence_ratio"]["value"] == pytest.approx(lobcq["divergence"] / nvfp4["divergence"])
    assert lobcq["weight_nmse"] < 0.6 * nvfp4["weight_nmse"] and lobcq["activation_nmse"] < 0.8 * nvfp4["activation_nmse"]
    journal = workspace / "table" / "both" / "lobcq.jsonl"
    before = journal.stat().st_mtime_ns
    assert main(bench) == 0 and journal.stat().st_mtime_ns == before


def bench(*formats, out):
    return ["bench", "perplexity", "tiny", "--text", "text.jsonl", "--max-documents", "3", "--out", out, "--formats", *formats]


def test_formats_that_do_not_fit_are_left_out_and_each_other_one_is_shown_as_it_ends(workspace, capsys):
    assert main(bench("int4:96", "int4:32", "nf4:32@16", out="some")) == 0
    told = capsys.readouterr()
    assert "int4:96: left out: model.layers.0.mlp.down_proj" not in told.err  # 384 inputs: 96 divides them
    left_out = "int4:96: left out: model.layers.0.mlp.gate_proj: quantization=int4 needs a multiple of 96 input features, not 128;"
    assert left_out in told.err and "use int4:32 or another divisor" in told.err
    lines = [line for line in told.err.splitlines() if "bits, perplexity" in line]
    assert [line.rpartition(": ")[0] for line in lines] == ["none", "int4:32", "nf4:32@16"]
    rows = json.loads((workspace / "some" / "both.json").read_text())
    assert [(row["format"], row["bits_per_weight"]) for row in rows] == [("none", 16.0), ("int4:32", 4.5), ("nf4:32@16", 4.5)]
    assert main(bench("int4:96", out="none-of-them")) == 2
    assert "model.layers.0.mlp.gate_proj: quantization=int4 needs" in capsys.readouterr().err
    assert main(bench("int8:64", out="none-of-them")) == 2
    assert "--formats int8:64: int8:64 is for int4 and nf4" in capsys.readouterr().err


def test_a_killed_benchmark_prints_the_formats_that_it_finished(workspace, monkeypatch, capsys):
    from qurl.ptq.evaluation import Text

    losses = Text.losses

    def killed_in_nvfp4(self, path, *args, **kwargs):
        if path.stem == "nvfp4":
            signal.raise_signal(signal.SIGTERM)
        return losses(self, path, *args, **kwargs)

    monkeypatch.setattr(Text, "losses", killed_in_nvfp4)
    before = signal.getsignal(signal.SIGTERM)
    assert main(bench("int8", "nvfp4", "mxfp4", out="killed")) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    table = capsys.readouterr().out
    assert "3 documents" in table and "none" in table and "int8" in table and "mxfp4" not in table
    assert [row["format"] for row in json.loads((workspace / "killed" / "both.json").read_text())] == ["none", "int8"]


def test_a_group_size_is_written_and_read_back(workspace, capsys):
    assert main(["quantize", "tiny", "grouped", "--format", "int4", "--group-size", "32"]) == 0
    assert "bits per weight: 4.50" in capsys.readouterr().out
    config = json.loads((workspace / "grouped" / "config.json").read_text())["quantization_config"]
    assert (config["group_size"], config["version"]) == (32, 3)
    assert format_of(config).block == (1, 32)
    assert main(["quantize", "tiny", "x", "--format", "int4", "--group-size", "48"]) == 2
    told = capsys.readouterr().err
    assert "multiple of 48" in told and "--group-size" in told
    assert main(["quantize", "tiny", "x", "--format", "int4", "--group-size", "12"]) == 2
    assert "--group-size 12 is no multiple of 8" in capsys.readouterr().err
    assert main(["export", "tiny", "exported", "--format", "int4", "--group-size", "64"]) == 0
    exported = json.loads((workspace / "exported" / "config.json").read_text())["quantization_config"]
    assert exported["config_groups"]["group_0"]["weights"]["group_size"] == 64
    assert main(["export", "tiny", "x", "--format", "int8", "--group-size", "64"]) == 2
    assert "--group-size 64 is for int4 and nf4" in capsys.readouterr().err


def test_outputs_are_measured_on_calibration_data(workspace, capsys):
    command = ["quantize", "tiny", "measured", "--format", "int8", "--calibration", "text.jsonl", "--num-calibration", "3"]
    assert main(command) == 0
    assert "output NMSE" in capsys.readouterr().out
    found = json.loads((workspace / "measured" / "report.json").read_text())["calibration"]
    assert found["documents"] == 3 and len(found["output_nmse"]) == 14
    model, tokenizer = AutoModelForCausalLM.from_pretrained("tiny", dtype=torch.float32), AutoTokenizer.from_pretrained("tiny")
    layer = model.model.layers[0].self_attn.q_proj
    inputs = []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0].double()))
    for text in load_documents("text.jsonl", "--text")[:3]:
        model(torch.tensor([[*tokenizer.encode(text), tokenizer.eos_token_id]]))
    x, weight = torch.cat(inputs).detach(), layer.weight.detach().double()
    scales = [rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127 for rows in (x, weight)]
    rounded, decoded = ((rows / scale).round() * scale for rows, scale in zip((x, weight), scales, strict=True))
    exact = x @ weight.T
    nmse = float((rounded @ decoded.T - exact).square().sum() / exact.square().sum())
    assert found["output_nmse"]["model.layers.0.self_attn.q_proj"] == pytest.approx(nmse, rel=0.02)


def test_codebooks_are_found_on_calibration_data_once(workspace, capsys):
    command = ["quantize", "tiny", "own", "--format", "lobcq", "--calibration", "text.jsonl", "--num-calibration", "3",
               "--ignore", "re:.*mlp", "--ignore", "re:.*layers.1", "--per"]  # fmt: skip
    assert main([*command, "layer"]) == 0
    files = [workspace / "own.codebooks.jsonl", workspace / "own" / "report.json"]
    before, made = [file.read_bytes() for file in files], files[0].stat().st_mtime_ns
    settings = json.loads((workspace / "own" / "config.json").read_text())["quantization_config"]
    assert codebook_sets_of(settings["codebooks"], "config.json").sha256 == json.loads(before[1])["settings"]["codebooks"]
    assert main([*command, "layer"]) == 0
    assert [file.read_bytes() for file in files] == before and files[0].stat().st_mtime_ns == made
    assert main([*command, "operand"]) == 2  # other codebooks
    assert "own holds a checkpoint of other arguments (codebooks: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["quantize", "tiny", "x", "--format", "int8", "--calibration", "absent.txt"], "--calibration='absent.txt' cannot be read"),
        (["quantize", "tiny", "x", "--format", "int8", "--num-calibration", "0"], "--num-calibration 0"),
        (["quantize", "tiny", "x", "--format", "int8", "--per", "layer"], "--per layer: --format int8 has no codebooks"),
        (["quantize", "tiny", "x", "--format", "lobcq", "--per", "layer"], "--per layer finds codebooks on text"),
        (["quantize", "tiny", "x", "--format", "lobcq_w4a16", "--per", "operand"], "leaves activations as they are"),
        (["quantize", "tiny", "x", "--format", "lobcq", "--per", "layer", "--codebooks", "b.json"], "leave one of them out"),
        (["quantize", "tiny", "x", "--format", "int9"], "--format int9: nothing to quantize to; use one of int8"),
        (["quantize", "tiny", "x", "--format", "none"], "--format none"),
        (["quantize", "/nowhere", "x", "--format", "int8"], "/nowhere is no Hugging Face folder"),
        (["quantize", "tiny", "x", "--format", "int8", "--ignore", "experts"], "matches none"),
        (["quantize", "tiny", "x", "--format", "int8", "--text", "absent.txt"], "--text='absent.txt' cannot be read"),
        (["quantize", "tiny", "x", "--format", "int8", "--text", "text.jsonl", "--context", "1"], "--context 1"),
        (["export", "tiny", "x", "--format", "nvfp4"], "qurl quantize SOURCE OUT --format nvfp4"),
        (["bench", "perplexity", "/nowhere", "--text", "text.jsonl", "--formats", "int8", "--out", "x"], "no Hugging Face folder"),
        (["bench", "perplexity", "tiny", "--text", "text.jsonl", "--formats", "int9", "--out", "x"], "--formats int9 is unknown"),
        (["bench", "perplexity", "tiny", "--text", "text.jsonl", "--formats", "int8", "--relative-to", "none", "--out", "x"],
         "--relative-to none: there is no increase"),
    ],
)
def test_user_errors_exit_with_2_and_one_line_and_leave_nothing(workspace, argv, told, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and told in error
    assert not (workspace / "x").exists()


def test_the_checkpoint_of_a_run_is_exported_once_and_removed_at_the_end(workspace, monkeypatch, capsys):
    from qurl.trainer import export

    run, exports = workspace / "run", []
    (run / "checkpoints" / "step_000007").mkdir(parents=True)
    (run / "config.yaml").write_text("")

    async def export_run(run_dir, out):
        exports.append(run_dir)
        shutil.copytree(workspace / "tiny", out)

    monkeypatch.setattr(export, "export_run", export_run)
    monkeypatch.setattr(export, "latest_checkpoint", lambda run_dir: run_dir / "checkpoints" / "step_000007")
    assert main(["quantize", "run", "of_run", "--format", "int8", "--ignore", "absent"]) == 2
    assert main(["quantize", "run", "of_run", "--format", "int8"]) == 0
    assert len(exports) == 2 and not list(workspace.glob(".of_run*"))
    assert main(["quantize", "tiny", "of_run", "--format", "int8"]) == 0  # the same weights: already there
