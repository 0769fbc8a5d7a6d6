"""Verifiers and their processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Unpayable(Enum):
    """What to do with rows whose ground truth the reward would not pay if a response gave it word for word."""

    error = "error"
    drop = "drop"
    keep = "keep"


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """Which function scores a response, and in how many killable processes."""

    function: str = "math"  # key of qurl.rewards.REWARDS or package.module:attribute or path/to/file.py:attribute
    kwargs: dict[str, Any] = field(default_factory=dict)
    num_workers: int = 1
    timeout_s: float = 10.0  # per response, what its module imports at the top not counted; then the process is killed: an error
    max_error_fraction: float = 0.1  # of an iteration's responses; more stops the run with exit code 3
    unpayable: Unpayable = Unpayable.error  # rows that a reward of qurl's own can never pay: refused, dropped or kept
