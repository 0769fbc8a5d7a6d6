"""An encoded checkpoint says how it was encoded, and another encoding is refused."""

import pytest

from qurl.quantization import FORMATS
from qurl.vllm_plugin import format_of, quantization_config


@pytest.mark.parametrize("name", FORMATS)
def test_what_this_version_writes_it_reads(name):
    assert format_of(quantization_config(name, encoded=True)) is FORMATS[name]


def test_another_version_or_codebooks_are_refused_with_what_would_work():
    written = quantization_config("lobcq", encoded=True)
    assert written["codebooks"] == FORMATS["lobcq"].codebooks_sha256
    others = [
        ({**written, "version": 2}, "quantization_config.version=2: .* another version .*, 1; quantize the model again"),
        ({key: value for key, value in written.items() if key != "version"}, "quantization_config.version=None"),
        ({**written, "codebooks": quantization_config("lobcq_int8", encoded=True)["codebooks"]}, "other codebooks"),
        ({**quantization_config("int8", encoded=True), "codebooks": "x"}, "quantization_config.codebooks='x'"),
    ]
    for config, message in others:
        with pytest.raises(ValueError, match=message):
            format_of(config)


def test_a_checkpoint_that_is_encoded_while_it_loads_says_nothing_of_it():
    assert quantization_config("lobcq") == {"quant_method": "qurl", "format": "lobcq", "ignore": [], "encoded": False}
