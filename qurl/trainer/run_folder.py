"""The folder of a run: <output_dir>/<run_name>/, its resolved configuration and its lock."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import yaml

from qurl.config import TrainConfig
from qurl.config.plain import flat, resolved
from qurl.errors import ConfigError
from qurl.locks import only_process

FREE_KEYS = frozenset({"num_steps", "run_name", "output_dir", "logging", "probe", "guard", "evaluation", "checkpoint", "cluster"})
"""What may differ between the command that started a run and the one that resumes it: nothing of it changes what is
learned, but for a guard's answer, which is for a person to change."""


class RunFolder:
    """Context manager: creates the folder, holds its lock, writes config.yaml.

    Raises ConfigError where another process trains there, or where a checkpoint there was made with another configuration."""

    def __init__(self, config: TrainConfig):
        self.path = Path(os.path.abspath(os.path.expanduser(config.output_dir))) / config.run_name
        self.resolved = resolved(config)
        self._held = ExitStack()

    def __enter__(self) -> RunFolder:
        refusal = f"run_name={self.path.name}: another process trains in {self.path}; use another run_name"
        with ExitStack() as stack:
            try:
                stack.enter_context(only_process(self.path / ".lock", refusal))
                self._refuse_other_config()
                (self.path / "config.yaml").write_text(yaml.safe_dump(self.resolved, sort_keys=False))
            except OSError as error:
                told = f"{error.filename} cannot be written ({error.strerror})"
                raise ConfigError(f"output_dir={self.path.parent}: {told}") from error
            self._held = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._held.close()

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
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed:
            key = changed[0]
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise ConfigError(f"{key}={now.get(key)}: the run in {self.path} was started with {before.get(key)}{more}; "
                              "resume with the same arguments or choose another run_name")  # fmt: skip
