"""The folder of a run: <output_dir>/<run_name>/, its resolved configuration and its lock."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import yaml

from qurl.config import TrainConfig
from qurl.config.paths import code_file
from qurl.config.plain import flat, resolved
from qurl.errors import ConfigError
from qurl.locks import only_process
from qurl.trainer.inputs import refuse_other_inputs

FREE_KEYS = frozenset({"num_steps", "run_name", "output_dir", "logging", "probe", "guard", "evaluation", "checkpoint", "cluster"})
"""What may differ between the command that started a run and the one that resumes it: nothing of it changes what is
learned, but for a guard's answer, which is for a person to change."""

INPUT_KEYS = (r"(model|critic|data\.train|data\.eval\..+)\.path|model\.tokenizer|reward\.function|"
              r"algorithm\.(advantage|correction|policy_loss)\.name")  # fmt: skip
"""What names a file or a folder: one content may have several names. Fingerprints in the checkpoint (qurl.trainer.inputs) judge
it; of a checkpoint without them, the names."""


class RunFolder:
    """Context manager: creates the folder and holds its lock. A folder that it created goes again where the run is refused (a
    ValueError) or leaves nothing.

    Raises ConfigError where another process trains there, or where a checkpoint there was made with another configuration."""

    def __init__(self, config: TrainConfig):
        self.path = Path(os.path.abspath(os.path.expanduser(config.output_dir))) / config.run_name
        self.resolved = resolved(config)
        self._held = ExitStack()
        self._missing: list[Path] = []  # the folders that did not exist before, innermost first
        self._renamed: dict[str, tuple[Any, Any]] = {}  # of INPUT_KEYS what the saved and this configuration say

    def __enter__(self) -> RunFolder:
        refusal = f"run_name={self.path.name}: another process trains in {self.path}; use another run_name"
        self._missing = [folder for folder in (self.path, *self.path.parents) if not os.path.lexists(folder)]
        with ExitStack() as stack:
            stack.callback(self._remove_empty)
            try:
                stack.enter_context(only_process(self.path / ".lock", refusal))
                self._refuse_other_config()
            except OSError as error:
                told = f"{error.filename} cannot be written ({error.strerror})"
                raise ConfigError(f"output_dir={self.path.parent}: {told}; name a folder that can be made or written") from error
            self._held = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.path in self._missing and isinstance(value, ValueError) and not self._has_results():
            shutil.rmtree(self.path, ignore_errors=True)
        self._held.close()

    def write_config(self) -> None:
        """Say in config.yaml what trains here from now on; called once everything has started."""
        partial = self.path / ".config.yaml"
        partial.write_text(yaml.safe_dump(self.resolved, sort_keys=False))
        partial.replace(self.path / "config.yaml")

    def refuse_other_inputs(self, state: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        """Raise ConfigError where the run of the checkpoint's `state` began with other content than `inputs`."""
        if "inputs" in state:
            refuse_other_inputs(state["inputs"], inputs, flat(self.resolved))
            return
        if self._renamed:
            self._refuse(self._renamed)

    def _has_results(self) -> bool:
        metrics = self.path / "metrics.jsonl"
        return (self.path / "checkpoints").exists() or (metrics.exists() and metrics.stat().st_size > 0)

    def _remove_empty(self) -> None:
        for folder in self._missing:
            with suppress(OSError):
                folder.rmdir()

    def _refuse_other_config(self) -> None:
        saved = self.path / "config.yaml"
        if not (self.path / "checkpoints" / "latest").exists() or not saved.exists():
            return
        try:
            content = dict(yaml.safe_load(saved.read_text()))
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise ConfigError(f"{saved} is damaged; remove it to go on with these arguments, or choose another run_name") from error
        before = flat({k: v for k, v in content.items() if k not in FREE_KEYS})
        now = flat({k: v for k, v in self.resolved.items() if k not in FREE_KEYS})
        changed = {key: (before.get(key), now.get(key)) for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
        sets_of = [{key.split(".")[2] for key in each if key.startswith("data.eval.")} for each in (before, now)]
        for key in [key for key in changed if key == "data.eval" or key.startswith("data.eval.")]:
            if key == "data.eval" or not all(key.split(".")[2] in sets for sets in sets_of):
                del changed[key]  # an evaluation set that is new or gone changes nothing that is learned
        inputs = {key: changed.pop(key) for key in list(changed) if re.fullmatch(INPUT_KEYS, key)}
        self._renamed = {key: names for key, names in inputs.items() if _real(names[0]) != _real(names[1])}
        if changed:
            self._refuse(changed)

    def _refuse(self, changed: Mapping[str, tuple[Any, Any]]) -> NoReturn:
        key = min(changed)
        before, now = changed[key]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ConfigError(f"{key}={now}: the run in {self.path} was started with {before}{more}; "
                          "resume with the same arguments or choose another run_name")  # fmt: skip


def _real(name: Any) -> Any:
    """The same for all spellings of one path."""
    if not isinstance(name, str):
        return name
    file = code_file(name) or name
    return os.path.realpath(os.path.expanduser(file)) + name[len(file) :]
