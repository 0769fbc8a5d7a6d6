"""A configuration as plain data: what a run folder keeps, and what two of them are compared by."""

from __future__ import annotations

import enum
from dataclasses import asdict
from typing import Any

from qurl.config.run import TrainConfig


def resolved(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain data; enums by name."""

    def plain(value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return value.name
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value

    return plain(asdict(config))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": [{"d": 2}]} -> {"a.b": 1, "c[0].d": 2}"""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                leaves |= flat(item, f"{prefix}{key}[{index}].")
        else:
            leaves[prefix + key] = value
    return leaves
