"""The search for a precision on a tiny model: through main(argv), against the commands that take what it writes."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qurl.cli.main import main
from qurl.config.compose import compose
from qurl.ptq import DocumentLoss, document_losses
from qurl.ptq.evaluation import Text, load_float32, quantized_in_memory
from qurl.ptq.precision_search import INT8, SearchSettings, _confirmed, _growth, _search, search_precision
from qurl.ptq.switched import SwitchedModel
from qurl.quantization import FORMATS, with_precision
from qurl.quantization.axbxp import parse

CANDIDATES = ("k4-w2-a2", "k4-w1-a2", "k2-w2g16-a3g1")
TEXT = ["--text", "text.jsonl", "--max-documents", "9"]
QUANTIZE = ["quantize", "tiny", "x", "--format", "axbxp", "--precision"]
THREE = [*TEXT, "--num-calibration", "3", "--num-confirmation", "3"]
SEARCH = ["search", "tiny", "found", *THREE, "--max-loss", "0.05", "--candidates", *CANDIDATES]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """`tiny/`, a random model that is sure of its answers, and `text.jsonl`."""
    from qurl.warmstart import make_tiny_model

    folder = tmp_path_factory.mktemp("workspace")
    make_tiny_model(folder / "tiny", hidden_size=128)
    weights = load_file(folder / "tiny" / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 4
    save_file(weights, folder / "tiny" / "model.safetensors", metadata={"format": "pt"})
    rows = [{"problem": f"{a}+{b}=?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"} for a in range(3) for b in range(4)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.fixture(scope="module")
def found(workspace):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        assert main(SEARCH) == 0
    return json.loads((workspace / "found" / "search.json").read_text())


def targets(model):
    return sorted(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head")


def test_a_switched_model_measures_what_the_format_computes(workspace):
    text = Text(workspace / "tiny", [str(workspace / "text.jsonl")], 4, 512)
    model = load_float32(workspace / "tiny")
    names = targets(model)
    switched = SwitchedModel(model, names)
    mixed = {"re:.*down_proj": "k2-w2g16-a2", "re:.*": "k4-w1-a2-truncated"}
    for precision in ("k4-w2-a2-noll", mixed, "k4-w2-a2-noll", "k1-w3g16-a3g1", mixed):
        reference = load_float32(workspace / "tiny")
        quantized_in_memory(with_precision(FORMATS["axbxp"], precision, names), names)(reference)
        expected = list(document_losses(reference, model, text.documents))
        for ours, theirs in zip(switched.losses(precision, text.documents), expected, strict=True):
            assert ours.num_tokens == theirs.num_tokens
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)  # an activation on a rounding border may fall either way
            assert ours.divergence == pytest.approx(theirs.divergence, rel=0.02)
    assert [loss.divergence for loss in switched.losses(None, text.documents)] == [0.0] * 4


def test_the_search_ends_within_the_bound_and_below_the_cost_of_any_single_setting_that_does(workspace, found):
    rows = {row["precision"]: row for row in found["rows"]}
    assert list(rows) == ["k4-w2-a2", "k4-w1-a2", "k2-w2g16-a3g1", "found"]
    assert found["network"] in CANDIDATES and found["calibration_divergence"] <= math.log1p(0.05)
    assert found["confirmation_increase"] <= 0.05 and rows["found"]["products"] < rows[found["network"]]["products"]
    assert rows["k4-w2-a2"]["energy_gain"] == rows["k4-w2-a2"]["memory_bound_gain"] == rows["k4-w2-a2"]["compute_bound_gain"] == 1
    settings = yaml.safe_load((workspace / "found" / "precision.yaml").read_text())
    assert settings == found["settings"] and len(settings) == 8 and len(set(settings.values())) > 1
    model = load_float32(workspace / "tiny")
    format = with_precision(FORMATS["axbxp"], settings, targets(model))
    for parts in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for layer in range(2):
            assert len({str(format.of_layer(f"model.layers.{layer}.{part}").precision) for part in parts}) == 1


def test_other_commands_take_the_file_as_it_is_and_measure_the_same(workspace, found, capsys):
    held_out = workspace / "rest.jsonl"
    held_out.write_text("".join(line + "\n" for line in (workspace / "text.jsonl").read_text().splitlines()[6:9]))
    file = "found/precision.yaml"
    bench = ["bench", "perplexity", "tiny", "--text", "rest.jsonl", "--out", "table", "--formats"]
    assert main([*bench, "axbxp:k4-w1-a2", f"axbxp:{file}"]) == 0
    _, single, mapped = json.loads((workspace / "table" / "both.json").read_text())
    rows = {row["precision"]: row for row in found["rows"]}
    assert single["perplexity"] == pytest.approx(rows["k4-w1-a2"]["perplexity"], rel=1e-4)
    assert mapped["perplexity"] == pytest.approx(rows["found"]["perplexity"], rel=1e-3)  # rounding borders, as above
    quantize = ["quantize", "tiny", "encoded", "--format", "axbxp", "--precision", file, "--text", "rest.jsonl"]
    assert main(quantize) == 0
    report = json.loads((workspace / "encoded" / "report.json").read_text())
    assert report["perplexity"]["after"] == pytest.approx(mapped["perplexity"], rel=1e-6)
    assert json.loads((workspace / "encoded" / "config.json").read_text())["quantization_config"]["precision"] == found["settings"]
    config = compose(["recipe=quickstart", "quantization=axbxp", f"quantization.precision={file}"])
    assert config.quantization.precision == found["settings"]


def test_a_search_that_was_stopped_goes_on_and_finds_the_same(workspace, found):
    text = Text(workspace / "tiny", ["text.jsonl"], 9, 512)
    settings = SearchSettings(max_loss=0.05, num_calibration=3, num_confirmation=3, candidates=CANDIDATES)
    stopped, seen = workspace / "stopped", []

    def stop(what, done, total):
        seen.append(what)
        if seen.count("precisions, calibration") == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_precision(workspace / "tiny", text, stopped, settings, stop)
    journal = stopped / "search.jsonl"
    before = journal.read_text()
    assert len(before.splitlines()) == 4 and not (stopped / "precision.yaml").exists()
    journal.write_text(before + '["k2-w2g16')  # killed in the middle of a line
    search_precision(workspace / "tiny", text, stopped, settings, lambda what, done, total: seen.append(what))
    assert journal.read_text() == (workspace / "found" / "search.jsonl").read_text()
    for file in ("search.json", "precision.yaml"):
        assert (stopped / file).read_text() == (workspace / "found" / file).read_text()
    count = seen.count("precisions, calibration")
    search_precision(workspace / "tiny", text, stopped, settings, lambda what, done, total: seen.append(what))
    assert seen.count("precisions, calibration") == count  # nothing is measured again


def rungs_of(start, less, count):
    """All layers `start`, then one more of them `less` each time."""
    names = [f"l{i}" for i in range(count)]
    return [dict.fromkeys(names, start) | dict.fromkeys(names[:changed], less) for changed in range(count + 1)]


def test_the_ladder_is_gone_down_as_far_as_the_confirmation_bears():
    start, less = parse("k2-w4-a4"), parse("k2-w3g16-a4")
    rungs = rungs_of(start, less, 40)
    measured = []

    def losses(name, precision):  # each rung costs 0.4 %
        measured.append(name)
        changed = sum(setting == str(less) for setting in (precision or {}).values())
        return [DocumentLoss(loss=100.0 + 50 * math.log1p(0.004 * changed), num_tokens=50, divergence=0.0)] * 2

    def confirm(bound):
        measured.clear()
        return _confirmed(rungs, start, bound, _growth(losses))

    assert confirm(0.17)[0] == 40 and set(measured) == {"none", "k2-w4-a4_rung_40"}
    for count in range(40):
        rung, increase = confirm(0.004 * count + 0.002)
        assert rung == count and increase == pytest.approx(0.004 * count)
        assert len(set(measured)) <= 2 + 1 + math.ceil(math.log2(40))


@pytest.mark.parametrize(("spread", "rung"), [(0.0, 2), (0.002, 1), (0.02, 0)])
def test_a_rung_stands_where_the_bound_is_a_standard_error_away(spread, rung):
    start, less = parse("k2-w4-a4"), parse("k2-w3g16-a4")

    def losses(name, precision):  # each rung costs 0.4 %, give or take
        changed = sum(setting == str(less) for setting in (precision or {}).values())
        costs = (0.004 * changed + sign * spread for sign in (1, -1)) if changed else (0.0, 0.0)
        return [DocumentLoss(loss=100.0 + 50 * cost, num_tokens=50, divergence=0.0) for cost in costs]

    assert _confirmed(rungs_of(start, less, 2), start, 0.009, _growth(losses))[0] == rung


def test_a_network_setting_that_is_not_confirmed_gives_way_to_the_next_dearer_one():
    def losses(name, precision):  # each setting costs what it says here, on the confirmation documents alone
        cost = {"k1-w3g16-a3g1": 0.03, "k2-w2g16-a3g1": 0.015, "k4-w1-a2": 0.005}.get(name, 0.0)
        return [DocumentLoss(loss=100.0 + 50 * math.log1p(cost), num_tokens=50, divergence=0.0)] * 2

    def network(bound, candidates, measure=lambda layers: 0.001 if set(map(str, layers.values())) <= {*candidates, INT8} else 1.0):
        settings = SearchSettings(max_loss=bound, num_calibration=1, num_confirmation=2, candidates=candidates)
        return str(_search({"down_proj": 1.0}, measure, settings, _growth(losses))[0])

    candidates = ("k4-w1-a2", "k1-w3g16-a3g1", "k2-w2g16-a3g1")
    assert [network(bound, candidates) for bound in (0.04, 0.02, 0.01)] == ["k1-w3g16-a3g1", "k2-w2g16-a3g1", "k4-w1-a2"]
    with pytest.raises(ValueError, match="--max-loss 0.004: k4-w1-a2 has 0.005 .- 0 on the confirmation documents, and no other"):
        network(0.004, candidates)
    with pytest.raises(ValueError, match="k2-w2g16-a3g1 has 0.015 .- 0 on the confirmation documents, and none of 1 precisions"):
        network(0.01, candidates[::2], lambda layers: 0.001 if "k4-w1-a2" not in map(str, layers.values()) else 1.0)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["search", "tiny", "x", *THREE, "--max-loss", "1e-9"], "--max-loss 1e-09: INT8 with all blocks"),
        (["search", "tiny", "x", *THREE, "--max-loss", "0.01", "--candidates", "k1-w1-a1"],
         "the best, k1-w1-a1, has"),
        (["search", "tiny", "x", *TEXT, "--max-loss", "0"], "--max-loss 0 is met by full precision alone"),
        (["search", "tiny", "x", *TEXT, "--num-calibration", "5"], "--text has 9 documents; the search takes 5, its confirm"),
        (["search", "tiny", "x", *TEXT, "--num-calibration", "0"], "--num-calibration 0 leaves no document"),
        (["search", "tiny", "x", *TEXT, "--num-confirmation", "0"], "--num-confirmation 0 is too few"),
        (["search", "tiny", "x", *THREE, "--ignore", "re:.*"], "leaves none of the model's 15 linear layers"),
        (["search", "tiny", "x", *THREE, "--ignore", "q_proj"], "as one matrix; ignore all of them or none"),
        (["search", "tiny", "x", *TEXT, "--candidates", "k9"], "--candidates 'k9' is no setting"),
        (["search", "/nowhere", "x", *TEXT], "/nowhere is no Hugging Face folder"),
        (["search", "tiny", "tiny", *THREE], "tiny exists and is no folder of `qurl search`"),
        ([*SEARCH, "--ignore", "down_proj"], "found holds a search of other arguments (ignore: [] there, ['down_proj'] now)"),
        (["quantize", "tiny", "x", "--format", "int8", "--precision", "k4-w1-a2"], "--precision needs --format axbxp"),
        ([*QUANTIZE, "absent.yaml"], "--precision=absent.yaml cannot be read"),
        ([*QUANTIZE, "text.json"], "no mapping of patterns to settings"),
        ([*QUANTIZE, "parts.yaml"], "different settings (model.layers.0.self_attn.k"),
        (["bench", "perplexity", "tiny", *TEXT, "--formats", "int8:k4-w1-a2", "--out", "x"], "needs quantization=axbxp"),
        (["bench", "perplexity", "tiny", *TEXT, "--formats", "axbxp:", "--out", "x"], "--formats axbxp:: "),
    ],
)
def test_user_errors_exit_with_2_and_one_line(workspace, found, argv, told, capsys):
    (workspace / "text.json").write_text("[1]")
    (workspace / "parts.yaml").write_text("q_proj: k4-w1-a2\n")
    try:
        assert main(argv) == 2
    finally:
        for file in sorted((workspace / "x").rglob("*"), reverse=True):
            file.unlink()
        if (workspace / "x").exists():
            (workspace / "x").rmdir()
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and told in error
