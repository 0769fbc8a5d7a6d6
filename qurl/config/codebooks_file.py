"""`quantization.codebooks`: a file that takes the place of its path, so that a run folder holds what its numbers depend on and
engines on other machines need no file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qurl.errors import ConfigError


def resolved_codebooks(value: Any, key: str = "quantization.codebooks") -> Any:
    """The content of the JSON file that `value` names; what is no path, as it is. key: the option, for errors. What the content
    must be, qurl.quantization.resolved_format knows. Raises ConfigError for a file that cannot be read."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(Path(value).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or f"it is no JSON: {error}"
        raise ConfigError(
            f"{key}={value} cannot be read ({told}); give a file that `python -m qurl.quantization.lobcq.calibrate` or `qurl "
            "calibrate` wrote"
        ) from error
