"""Where vLLM reads a config.json otherwise than transformers does.

transformers ignores keys that the class of a model type does not know, and keeps them. vLLM asks for the number of key-value heads
under several names, whatever the model type: a GPT-NeoX with a stray num_key_value_heads then attends to the wrong keys."""

from __future__ import annotations

from typing import Any

KV_HEAD_KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
"""What vLLM 0.32 asks for, in that order."""


def declared_keys(config: Any) -> set[str]:
    """Names that the class of a transformers config knows, whatever else its config.json says."""
    return set(getattr(type(config), "__dataclass_fields__", ())) | set(config.attribute_map)


def stray_head_counts(config: Any) -> dict[str, int]:
    """Keys of a config.json that its class does not know but vLLM reads, with the value that means what the class computes.

    config: of transformers, of the text part. Only of classes that know no number of key-value heads at all, which have as many as
    attention heads. Of code that came with a checkpoint nothing is known."""
    known = declared_keys(config)
    if not known or not hasattr(type(config), "__dataclass_fields__") or any(key in known for key in KV_HEAD_KEYS):
        return {}
    if "multi_query" in known:  # falcon, gpt_bigcode: another key says it
        return {}
    heads = config.num_attention_heads
    return {key: heads for key in KV_HEAD_KEYS if getattr(config, key, heads) not in (heads, None)}
