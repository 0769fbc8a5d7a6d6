"""Paths of a configuration as every process of a run must be told them: an actor's working folder is that of `ray start`."""

from __future__ import annotations

import copy
import os
from pathlib import Path

from qurl.config.run import TrainConfig


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """A copy whose paths of existing files and folders, and output_dir, are absolute. Names of a hub or a table stay."""
    config = copy.deepcopy(config)
    config.output_dir = os.path.abspath(os.path.expanduser(config.output_dir))
    config.model.path = _absolute(config.model.path)
    config.model.tokenizer = config.model.tokenizer and _absolute(config.model.tokenizer)
    config.critic.path = config.critic.path and _absolute(config.critic.path)
    for dataset in (config.data.train, *config.data.eval.values()):
        paths = [_absolute(path) for path in dataset.paths]
        dataset.path = paths if isinstance(dataset.path, list) else paths[0]
    config.reward.function = _absolute_code(config.reward.function)
    algorithm = config.algorithm
    for plug in (algorithm.advantage, algorithm.correction, algorithm.policy_loss):
        plug.name = _absolute_code(plug.name)
    return config


def shared_paths(config: TrainConfig) -> dict[str, str]:
    """Configuration key -> path that ranks and engines read on whichever node they are; of a configuration with absolute paths."""
    algorithm = config.algorithm
    paths = {
        "model.path": config.model.path,
        "critic.path": config.critic.path or "",
        "algorithm.correction.name": code_file(algorithm.correction.name),
        "algorithm.policy_loss.name": code_file(algorithm.policy_loss.name),
        "algorithm.advantage.name": code_file(algorithm.advantage.name),
    }
    return {key: path for key, path in paths.items() if os.path.isabs(path)}


def code_file(name: str) -> str:
    """The file of a plug point that is named as path/to/file.py:attribute; "" for any other."""
    file, colon, _ = name.rpartition(":")
    return file if colon and file.endswith(".py") else ""


def _absolute(path: str) -> str:
    expanded = os.path.expanduser(path)
    is_pattern = any(character in path for character in "*?[")  # of the files of a data set
    return os.path.abspath(expanded) if path and (is_pattern or Path(expanded).exists()) else path


def _absolute_code(name: str) -> str:
    file = code_file(name)
    return _absolute(file) + name[len(file) :] if file else name
