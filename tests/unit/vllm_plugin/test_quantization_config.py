"""Which layer gets which format, and what is refused."""

import subprocess
import sys

import pytest

pytest.importorskip("vllm")

from qurl import vllm_plugin
from qurl.quantization.lobcq import Codebooks, CodebookSets, LayerCodebooks, Layout
from qurl.vllm_plugin.config import QurlConfig
from qurl.vllm_plugin.transfer import QurlUpdateInfo

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def config(format, ignore, **options):
    """A config that has seen the linear layers of a two-layer model."""
    built = QurlConfig.from_config(vllm_plugin.quantization_config(format, ignore, **options))
    built.packed_modules_mapping = PACKED
    for layer in (0, 1):
        for module in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            built._linear_names += built.hf_names(f"model.layers.{layer}.{module}")
    return built


def test_ignoring_a_layer_reaches_all_its_fused_modules():
    built = config("int8", ["re:model.layers.0.self_attn.(q|k|v)_proj", "down_proj", "lm_head"])
    assert built.format_of(built.hf_names("model.layers.0.self_attn.qkv_proj")).name == "none"
    assert built.format_of(built.hf_names("model.layers.1.self_attn.qkv_proj")).name == "int8"
    assert built.format_of(["model.layers.1.mlp.down_proj"]).name == "none"


def test_ignoring_a_part_of_a_fused_module_is_an_error_that_names_it():
    built = config("int8", ["q_proj"])
    with pytest.raises(ValueError, match=r"quantization\.ignore.*q_proj.*as one matrix"):
        built.format_of(built.hf_names("model.layers.0.self_attn.qkv_proj"))


def test_parts_of_one_matrix_must_have_the_same_codebooks():
    def books(reach):
        return Codebooks(layout=Layout(), entries=(tuple(round(reach * (2 * c - 15) / 15) for c in range(16)),) * 16)

    def built(*patterns):
        layers = [(pattern, LayerCodebooks(weights=books(reach), activations=books(31))) for pattern, reach in patterns]
        return config("lobcq", ["1.mlp.down_proj"], codebooks=CodebookSets(tuple(layers)).content)

    found = built(("re:.*layers.0.self_attn.[qkv]_proj", 30), ("re:.*", 28))
    for name, reach in (("0.self_attn.qkv_proj", 30), ("1.self_attn.qkv_proj", 28), ("0.mlp.gate_up_proj", 28)):
        assert found.format_of(found.hf_names(f"model.layers.{name}")).codebooks.weights == books(reach)
    assert found.format_of(["model.layers.1.mlp.down_proj"]).name == "none"
    for layers, told in (
        ((("0.self_attn.q_proj", 30), ("re:.*", 28)), "different codebooks for .*0.self_attn.q_proj, .*, which an engine"),
        ((("down_proj", 30),), "no codebooks for model.layers.0.mlp.gate_proj"),
        ((("1.mlp.down_proj", 30), ("re:.*", 28)), "'1.mlp.down_proj', which matches none of the 13 quantized layers"),
    ):
        with pytest.raises(ValueError, match=told):
            built(*layers).format_of(["model.layers.0.mlp.down_proj"])


def test_a_pattern_without_a_match_is_an_error():
    with pytest.raises(ValueError, match=r"quantization\.ignore='experts' matches none"):
        config("fp8", ["experts"]).format_of(["model.layers.0.mlp.down_proj"])


def test_full_precision_asks_no_pattern():
    assert config("none", []).format_of(["model.layers.0.mlp.down_proj"]).name == "none"


def test_an_unknown_format_is_refused_with_the_ones_there_are():
    with pytest.raises(ValueError, match=r"quantization\.format='int7' is unknown; use one of .*int8"):
        vllm_plugin.engine_args("int7")
    with pytest.raises(ValueError, match="int7"):
        QurlConfig.from_config({"quant_method": "qurl", "format": "int7"})


def test_registering_twice_is_registering_once():
    vllm_plugin.register()
    vllm_plugin.register()
    from vllm.model_executor.layers.quantization import get_quantization_config

    assert get_quantization_config("qurl") is QurlConfig


def test_a_message_carries_a_bucket_or_a_manifest():
    with pytest.raises(ValueError, match="one of them"):
        QurlUpdateInfo(version=1)
    with pytest.raises(ValueError, match="one of them"):
        QurlUpdateInfo(version=1, bucket=object(), manifest=[])


def test_importing_the_plugin_imports_no_vllm():
    code = "import sys, qurl.vllm_plugin as p; p.engine_args('int8'); sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
