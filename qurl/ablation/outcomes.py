"""What is known of the runs of an ablation: <out>/outcomes.json, rewritten whole after each of them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qurl.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run ended."""

    seconds: float  # wall clock of the processes that finished it
    stopped: str | None = None  # why a guard stopped it (exit code 3); None where it trained to the end
    accuracy: dict[str, float] | None = None  # of the trained policy in full precision, by dataset; None until evaluated


class Outcomes:
    """Mapping of run name to Outcome that survives a killed process."""

    def __init__(self, folder: Path, asked: dict[str, Any]):
        """asked: what decides the results. Raises ConfigError where the folder holds the outcomes of something else."""
        self._path = folder / "outcomes.json"
        self._asked = asked
        self._found: dict[str, Outcome] = {}
        if self._path.exists():
            try:
                content = json.loads(self._path.read_text())
                self._found = {name: Outcome(**outcome) for name, outcome in content["outcomes"].items()}
                content["asked"].get("")
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ConfigError(f"{self._path} is damaged; remove it to begin anew, or use another --out") from error
            for key, value in asked.items():
                if content["asked"].get(key) != value:
                    found = content["asked"].get(key)
                    raise ConfigError(f"--out {folder} holds an ablation with {key} {found}, now {value}; use another folder")

    def get(self, run_name: str) -> Outcome | None:
        """None where the run has not ended."""
        return self._found.get(run_name)

    def put(self, run_name: str, outcome: Outcome) -> None:
        """Add or replace, on disk as well."""
        self._found[run_name] = outcome
        content = {"asked": self._asked, "outcomes": {name: asdict(value) for name, value in self._found.items()}}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1))
        os.replace(temporary, self._path)
