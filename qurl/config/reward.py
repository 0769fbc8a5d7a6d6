"""Verifiers and their processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """Which function scores a response, and in how many killable processes."""

    function: str = "math"  # key of qurl.rewards.REWARDS or package.module:attribute or path/to/file.py:attribute
    kwargs: dict[str, Any] = field(default_factory=dict)
    num_workers: int = 1
    timeout_s: float = 10.0  # per response, what its module imports at the top not counted; then the process is killed: an error
    max_error_fraction: float = 0.1  # of an iteration's responses; more stops the run with exit code 3
