"""`quantization.precision` in a file, as `qurl search` writes it: a YAML or JSON mapping of patterns to settings, whose path stands
wherever a setting may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SUFFIXES = (".yaml", ".yml", ".json")


def resolved_precision(value: Any, key: str = "quantization.precision") -> Any:
    """The mapping in the file that `value` names, by one of SUFFIXES; anything else as it is. key: the option, for errors. Raises
    ValueError for a file that cannot be read or holds no such mapping."""
    if not isinstance(value, str) or not value.endswith(SUFFIXES):
        return value
    import yaml  # what has only torch imports this module

    try:
        content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{key}={value} cannot be read: {' '.join(str(error).split())}") from error
    is_mapping = isinstance(content, dict) and all(isinstance(each, str) for pair in content.items() for each in pair)
    if not content or not is_mapping:
        raise ValueError(f"{key}={value} is no mapping of patterns to settings; give a file that `qurl search` wrote")
    return content


def write_precision(path: Path, settings: dict[str, str], comment: str) -> None:
    """All or nothing; comment: a line or several."""
    import yaml

    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    partial = path.with_name(path.name + ".partial")
    partial.write_text(lines + yaml.safe_dump(settings, sort_keys=False, width=1000), encoding="utf-8")
    partial.replace(path)
