"""`quantization.codebooks`: a format with a file's codebooks and layouts, universal or not, and what is refused."""

import json

import pytest
import torch
import yaml

from qurl.config import QuantizationConfig
from qurl.config.compose import compose, load_config
from qurl.config.plain import resolved
from qurl.errors import ConfigError
from qurl.quantization import FORMATS, error_report, resolved_format
from qurl.quantization.lobcq import Codebooks, CodebookSets, LayerCodebooks, Layout, load_codebooks
from qurl.quantization.lobcq.codebook_sets import save_codebook_sets
from qurl.quantization.lobcq.codebooks import save_codebooks
from qurl.vllm_plugin import format_of, quantization_config

OTHER = Layout(block=4, array=32, num_codebooks=8)


def books(layout=OTHER, step=0):
    """Book k spreads its 16 entries evenly over +-its own reach; step: makes others."""
    reaches = [layout.largest - 3 * (layout.num_codebooks - 1 - k) - step for k in range(layout.num_codebooks)]
    return Codebooks(layout=layout, entries=tuple(tuple(round(r * (2 * c - 15) / 15) for c in range(16)) for r in reaches))


@pytest.fixture
def file(tmp_path):
    save_codebooks(books(), tmp_path / "books.json", "by hand")
    return tmp_path / "books.json"


def decoded_slowly(wire, codebooks):
    """float64, number by number, from the bits on the wire; two codes a byte, the even one low, selectors from the lowest bit."""
    layout, codes = codebooks.layout, wire["weight"]
    out = torch.empty(len(codes), 2 * codes.shape[1], dtype=torch.float64)
    for row in range(len(codes)):
        bits = sum(int(byte) << (8 * i) for i, byte in enumerate(wire["weight_selector"][row]))
        for i in range(out.shape[1]):
            code = int(codes[row, i // 2]) >> (4 * (i % 2)) & 15
            book = bits >> (i // layout.block * layout.selector_bits) & (layout.num_codebooks - 1)
            scale = float(wire["weight_scale"][row, i // layout.array]) / float(wire["weight_global_scale"])
            out[row, i] = codebooks.entries[book][code] * scale
    return out


def test_a_format_has_the_layout_and_codebooks_of_the_file(file):
    config = QuantizationConfig(format="lobcq", codebooks=str(file))
    assert config.codebooks == json.loads(file.read_text())
    format = resolved_format("lobcq", codebooks=config.codebooks)
    assert (format.name, format.layout, format.sets.universal_set) == ("lobcq", OTHER, books())
    assert resolved_format("lobcq_w4a16", codebooks=config.codebooks).keeps_activations
    assert format.key != FORMATS["lobcq"].key and resolved_format("lobcq") is FORMATS["lobcq"]
    weight = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    wire = format.encode(weight)
    assert format.bits_per_weight(weight.shape) == 8 * sum(tensor.nbytes for tensor in wire.values()) / weight.numel()
    slowly = decoded_slowly(wire, books())
    torch.testing.assert_close(format.decode(wire).double(), slowly, rtol=1e-6, atol=0.0)  # a float32 division and a product
    assert float((weight.double() - slowly).norm() / weight.norm()) < 0.2


def test_a_checkpoint_carries_its_own_codebooks_whole(file):
    content = json.loads(file.read_text())
    for encoded in (True, False):
        entry = json.loads(json.dumps(quantization_config("lobcq", encoded=encoded, codebooks=content)))
        assert entry["codebooks"] == books().content and len(json.dumps(entry)) < 2000
        assert format_of(entry).sets.universal_set == books()
        entry["codebooks"]["codebooks"][0][0] += 1
        with pytest.raises(ValueError, match=r"quantization\.codebooks holds LO-BCQ codebooks .*, not .* wrong numbers"):
            format_of(entry)


def test_what_does_not_fit_is_refused_before_anything_starts(file, tmp_path):
    content = json.loads(file.read_text())
    for name, told in (
        ("int8", "needs quantization=lobcq or lobcq_w4a16 or lobcq_int8, and int8 is given"),
        ("lobcq_int8", "has codewords of 6 bits, and those of quantization=lobcq_int8 have 8; use quantization=lobcq or"),
    ):
        with pytest.raises(ValueError, match=rf"quantization\.codebooks {told}"):
            resolved_format(name, codebooks=content)
    for damaged in ({}, [], "text", {**content, "layout": {"block": 3}}, {**content, "codebooks": content["codebooks"][1:]}):
        with pytest.raises(ValueError, match="quantization.codebooks holds no LO-BCQ codebooks"):
            resolved_format("lobcq", codebooks=damaged)
    with pytest.raises(ValueError, match="needs a multiple of 32 input features, not 48; .*quantization.codebooks with shorter"):
        resolved_format("lobcq", codebooks=content).check_columns(48)
    (tmp_path / "damaged.json").write_text(file.read_text()[:-20])
    for path, told in ((tmp_path / "absent.json", "No such file"), (tmp_path / "damaged.json", "it is no JSON")):
        with pytest.raises(ConfigError, match=rf"quantization\.codebooks={path} cannot be read \({told}"):
            QuantizationConfig(format="lobcq", codebooks=str(path))


def test_a_run_keeps_the_content_and_needs_the_file_no_more(file, tmp_path):
    needed = ["model.path=nowhere", "data.train.path=nowhere.jsonl", "run_name=own"]
    config = compose([*needed, "quantization=lobcq", f"quantization.codebooks={file}"])
    assert config.quantization.codebooks["sha256"] == books().sha256
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(resolved(config)))
    file.unlink()
    again = load_config(tmp_path / "config.yaml").quantization
    assert again == config.quantization
    assert resolved_format(again.format, codebooks=again.codebooks).sets.universal_set == books()
    with pytest.raises(ConfigError, match=r"quantization\.codebooks=.*books.json cannot be read \(No such file"):
        compose([*needed, "quantization=lobcq", f"quantization.codebooks={file}"])


def test_a_file_that_states_another_hash_is_refused(file):
    file.write_text(file.read_text().replace(books().sha256, books(step=1).sha256))
    with pytest.raises(ValueError, match="wrong numbers"):
        load_codebooks(file)


LAYERS = [f"model.layers.{i}.{name}_proj" for i in (0, 1) for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.down")]
ATTENTION = r"re:model\.layers\.0\.self_attn\."


def sets(**changed):
    """Other codebooks for either operand of each of three groups of layers."""
    patterns = {ATTENTION: 0, "1.mlp.down_proj": 2, "re:.*": 4} | changed
    return CodebookSets(tuple(
        (pattern, LayerCodebooks(weights=books(step=step), activations=books(step=step + 1))) for pattern, step in patterns.items()
    ))  # fmt: skip


def test_each_layer_and_operand_has_the_codebooks_of_the_first_pattern_that_matches(tmp_path):
    save_codebook_sets(sets(), tmp_path / "books.json", "by hand")
    config = QuantizationConfig(format="lobcq", codebooks=str(tmp_path / "books.json"))
    format = resolved_format("lobcq", codebooks=config.codebooks, layers=LAYERS)
    assert format.sets == sets() and format.layout == OTHER
    weight, x = (torch.randn(3, 96, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for name in LAYERS:
        step = 0 if "0.self_attn" in name else 2 if name == "model.layers.1.mlp.down_proj" else 4
        layer = format.of_layer(name)
        wire = layer.encode(weight)
        torch.testing.assert_close(layer.decode(wire).double(), decoded_slowly(wire, books(step=step)), rtol=1e-6, atol=0.0)
        codewords = layer.quantize_activations(x)[0]
        alone = resolved_format("lobcq", codebooks=books(step=step + 1).content)
        assert torch.equal(codewords, alone.quantize_activations(x)[0])
        alone = resolved_format("lobcq", codebooks=books(step=step).content).encode(weight)
        assert all(torch.equal(wire[suffix], alone[suffix]) for suffix in alone)
    q, k, other = (format.of_layer(f"model.layers.{name}_proj") for name in ("0.self_attn.q", "0.self_attn.k", "1.self_attn.q"))
    assert q is k is format.of_layers(LAYERS[:3]) and len({q.key, other.key, format.key}) == 3
    with pytest.raises(AssertionError, match="of_layer chooses the codebooks"):
        format.encode(weight)
    state = {f"{name}.weight": weight for name in LAYERS}
    worst = {row.name: row.relative_error for row in error_report(state, format, LAYERS).matrices}
    assert len(set(worst.values())) == 3 and worst[LAYERS[0]] == worst[LAYERS[2]] != worst[LAYERS[4]]


def test_a_set_counts_its_bits_over_the_weights_that_use_it():
    format = resolved_format("lobcq", codebooks=sets().content, layers=LAYERS)
    assert format.shared_bits(LAYERS) == 3 * 8 * 16 * 6 and format.shared_bits(LAYERS[:3]) == 8 * 16 * 6
    assert resolved_format("lobcq", codebooks=books().content).shared_bits(LAYERS) == 8 * 16 * 6
    assert FORMATS["lobcq"].shared_bits(LAYERS) == 0  # one for all models
    row, wire = format.wire_row(64), format.of_layer(LAYERS[3]).encode(torch.randn(1, 64))
    assert {name: (part.shape, part.dtype) for name, part in row.items()} == {
        name: (part.shape, part.dtype) for name, part in wire.items()
    }


def test_sets_travel_with_a_checkpoint_and_a_run(tmp_path):
    content = json.loads(json.dumps(sets().content))
    for encoded in (True, False):
        entry = json.loads(json.dumps(quantization_config("lobcq", encoded=encoded, codebooks=content), sort_keys=True))
        assert entry["codebooks"] == sets().content and format_of(entry).sets == sets()
        entry["codebooks"]["layers"].reverse()  # another layer would have the last pattern's
        with pytest.raises(ValueError, match=r"quantization\.codebooks holds LO-BCQ codebooks .*, not .* wrong numbers"):
            format_of(entry)
    save_codebook_sets(sets(), tmp_path / "books.json", "by hand")
    needed = ["model.path=nowhere", "data.train.path=nowhere.jsonl", "run_name=own"]
    config = compose([*needed, "quantization=lobcq", f"quantization.codebooks={tmp_path / 'books.json'}"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(resolved(config)))
    again = load_config(tmp_path / "config.yaml").quantization
    assert resolved_format(again.format, codebooks=again.codebooks).sets == sets()


def test_a_universal_set_keeps_its_file_and_its_hash(file):
    universal = CodebookSets.universal(books())
    before = file.read_bytes()
    save_codebook_sets(universal, file, "by hand")
    assert file.read_bytes() == before and universal.sha256 == books().sha256
    assert resolved_format("lobcq", codebooks=json.loads(before)).of_layer("any").sets == universal


def test_sets_that_do_not_fit_a_model_are_refused():
    def refused(told, content, layers=LAYERS):
        with pytest.raises(ValueError, match=told):
            resolved_format("lobcq", codebooks=content, layers=layers)

    deeper = sets(**{"2.mlp.down_proj": 6}).content
    refused("has codebooks for '2.mlp.down_proj', which matches none of the 8 quantized layers", deeper)
    only = CodebookSets(sets().layers[:2])
    refused("has no codebooks for model.layers.0.mlp.down_proj; calibrate them on this model with `qurl calibrate`", only.content)
    split = CodebookSets((("0.self_attn.k_proj", sets().layers[1][1]), *sets().layers))
    refused("different codebooks for .*q_proj, .*k_proj, .*v_proj, which an engine runs as one matrix", split.content)
    refused(r"'re:\(' is no valid regular expression", CodebookSets((("re:(", sets().layers[0][1]),)).content)
    content = sets().content
    refused("has version 3 of LO-BCQ's codebooks, and this qurl reads 2", {**content, "version": 3})
    refused("holds no LO-BCQ codebooks: KeyError: 'layouts'", {"version": 2})
    layouts = {"weights": {}, "activations": {"block": 2}}
    for damaged in ({"layers": []}, {"layers": [{}]}, {"layouts": layouts}, {"layers": "text"}):
        refused("holds no LO-BCQ codebooks", content | damaged)
    other = Layout(block=4, array=64, num_codebooks=8)
    with pytest.raises(ValueError, match="only codeword_bits may differ"):
        LayerCodebooks(weights=books(), activations=books(other))
    with pytest.raises(ValueError, match="have different layouts"):
        CodebookSets((("q_proj", sets().layers[0][1]), ("re:.*", LayerCodebooks(weights=books(other), activations=books(other)))))
