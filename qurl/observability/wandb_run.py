"""Weights & Biases: must start when asked for; after that it may fail without stopping the training."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qurl.config.run import LoggingConfig, WandbMode
from qurl.errors import ConfigError

logger = logging.getLogger(__name__)


class WandbRun:
    """One wandb run. Its id is kept in <run_dir>/wandb_id.txt, so a resumed training goes on with the same run."""

    def __init__(self, config: LoggingConfig, run_dir: Path, resolved_config: Mapping[str, Any], run_id: str | None = None) -> None:
        """run_id: overrides the kept one. Raises ConfigError where wandb is missing or does not start."""
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"logging.wandb={config.wandb.value} needs the package wandb ({error}); use disabled") from error
        id_file = run_dir / "wandb_id.txt"
        self.run_id = run_id or (id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4))
        self._failures = (wandb.Error, OSError, RuntimeError, ValueError)
        try:
            self._run = wandb.init(
                project=config.wandb_project, entity=config.wandb_entity, id=self.run_id, name=run_dir.name, dir=str(run_dir),
                mode=config.wandb.value, resume="allow" if config.wandb is WandbMode.online else None,
                config=dict(resolved_config), settings=wandb.Settings(console="off"),
            )
        except self._failures as error:
            raise ConfigError(
                f"logging.wandb={config.wandb.value} did not start ({error}); run `wandb login`, or use offline or disabled"
            ) from error
        id_file.write_text(self.run_id + "\n")
        self._run.define_metric("*", step_metric="step")  # our own axis: a resumed run may repeat steps, wandb's only grows

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send values; a failure is logged."""
        try:
            self._run.log({"step": step, **values})
        except self._failures as error:
            logger.warning("wandb did not take step %d: %s", step, error)

    def close(self) -> None:
        """Finish the run; a failure is logged."""
        try:
            self._run.finish()
        except self._failures as error:
            logger.warning("wandb did not finish: %s", error)
