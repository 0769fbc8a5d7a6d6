"""`quantization.codebooks`: a format with a file's codebooks and layout, and what is refused."""

import json

import pytest
import torch
import yaml

from qurl.config import QuantizationConfig
from qurl.config.compose import compose, load_config
from qurl.config.plain import resolved
from qurl.errors import ConfigError
from qurl.quantization import FORMATS, resolved_format
from qurl.quantization.lobcq import Codebooks, Layout, load_codebooks
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
