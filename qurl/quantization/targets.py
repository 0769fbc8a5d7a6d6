"""Which linear layers become low precision."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

OUTPUT_HEAD = "lm_head"
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Last components of modules that engines run as one matrix."""


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
    if not targets and not ignore:
        raise ValueError(
            f"the model has no linear layers (torch.nn.Linear) but {OUTPUT_HEAD}, and only those can be quantized; "
            "use quantization.format=none"
        )
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


def engine_pattern(name: str) -> str:
    """A pattern for the module and those that engines run as one matrix with it."""
    parent, dot, leaf = name.rpartition(".")
    together = next((parts for parts in FUSED if leaf in parts), None)
    return name if together is None else f"re:{re.escape(parent + dot)}({'|'.join(together)})$"


def engine_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Which of the modules engines run as one matrix, by the pattern that they have together."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(engine_pattern(name), []).append(name)
    return found
