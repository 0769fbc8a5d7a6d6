"""Which linear layers become low precision."""

from __future__ import annotations

import re
from collections.abc import Sequence

OUTPUT_HEAD = "lm_head"


def select_targets(linear_names: Sequence[str], ignore: Sequence[str]) -> frozenset[str]:
    """Names of the modules to quantize: all but those that match a pattern, and never an lm_head.

    ignore: "re:<regex>" matches from the start of the full name, as in compressed-tensors; anything else is a full module name
    or its last components ("down_proj", "mlp.down_proj" and "model.layers.0.mlp.down_proj" all match the latter).
    Raises ValueError for a pattern that is no regex or matches nothing, and where nothing is left to quantize."""
    candidates = [*linear_names, OUTPUT_HEAD]  # a tied head is no linear layer of its own, yet may be named
    ignored = {name for name in candidates if name.rpartition(".")[2] == OUTPUT_HEAD}
    for pattern in ignore:
        matches = {name for name in candidates if matches_pattern(name, pattern, "quantization.ignore")}
        if not matches:
            example = linear_names[0] if linear_names else "none"
            raise ValueError(
                f"quantization.ignore={pattern!r} matches none of the model's {len(linear_names)} linear layers (the first is "
                f"{example!r}); use a module name, its last components, or 're:' and a regex for the whole name"
            )
        ignored |= matches
    targets = frozenset(linear_names) - ignored
    if not targets:
        raise ValueError(
            f"quantization.ignore={list(ignore)} leaves none of the model's {len(linear_names)} linear layers to quantize; "
            "ignore fewer, or use quantization.format=none"
        )
    return targets


def matches_pattern(name: str, pattern: str, key: str) -> bool:
    """Whether a module has a pattern of select_targets. key: that it was given for, which the ValueError names for a bad regex."""
    if not pattern.startswith("re:"):
        return f".{name}".endswith(f".{pattern}")
    try:
        return re.match(pattern.removeprefix("re:"), name) is not None
    except re.error as error:
        raise ValueError(f"{key}={pattern!r} is no valid regular expression: {error}") from error
