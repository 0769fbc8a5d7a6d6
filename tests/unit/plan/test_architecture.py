"""Architectures that learner or engines cannot compute are refused in one line, by what config.json and modules say."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qurl.errors import ConfigError
from qurl.plan.architecture import CPU_HEAD_SIZES, check_head_size, check_trainable
from qurl.rollout.config_json import stray_head_counts

sys.path.insert(0, str(Path(__file__).parents[2] / "matrix"))

from architectures import REFUSED, TRAINED, tiny_config


class Tokenizer:
    """As much of one as a config needs."""

    eos_token_id, pad_token_id = 1, 0

    def __len__(self):
        return 320


def check(name, attn_implementation="sdpa"):
    config = tiny_config(name, Tokenizer())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    check_trainable(config.get_text_config(), model, attn_implementation, "model.path=m")
    check_head_size(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads, "cpu")


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_trained_by_the_matrix_is_accepted(name):
    check(name)  # raises ConfigError for what is refused


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_refused_in_one_line(name):
    with pytest.raises(ConfigError, match=REFUSED[name]) as raised:
        check(name)
    assert str(raised.value).startswith("model.path") and "; use " in str(raised.value) and "\n" not in str(raised.value)


def test_capped_attention_is_computed_by_eager_attention_alone():
    with pytest.raises(ConfigError, match="use model.attn_implementation=eager"):
        check("gemma2_capped_attention")
    check("gemma2_capped_attention", "eager")


def test_head_sizes_are_those_of_the_device():
    with pytest.raises(ConfigError, match="heads of 16 channels"):
        check_head_size(16, "cpu")
    check_head_size(16, "cuda")
    assert all(check_head_size(size, "cpu") is None for size in CPU_HEAD_SIZES)


def test_cpu_head_sizes_are_those_that_vllm_says_it_has():
    """Read from its source: importing vLLM takes ten seconds."""
    source = Path(importlib.util.find_spec("vllm").origin).with_name("v1") / "attention" / "backends" / "cpu_attn.py"
    listed = re.search(r"def get_supported_head_sizes.*?return \[(.*?)\]", source.read_text(), re.DOTALL).group(1)
    assert tuple(map(int, listed.split(","))) == CPU_HEAD_SIZES


def test_a_stray_number_of_key_value_heads_is_what_the_class_computes():
    """GPT-NeoX has as many as attention heads, whatever its config.json says; vLLM believes config.json."""
    assert tiny_config("gpt_neox", Tokenizer()).num_key_value_heads == 1
    assert stray_head_counts(tiny_config("gpt_neox", Tokenizer())) == {"num_key_value_heads": 2}
    assert all(stray_head_counts(tiny_config(name, Tokenizer())) == {} for name in ("llama", "qwen2", "olmo2", "gpt2"))
