"""The configuration arguments that `train` and `plan` share."""

from __future__ import annotations

import argparse

from qurl.config.compose import compose, group_options
from qurl.config.run import TrainConfig
from qurl.config.validate import validate


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """key=value arguments, with the groups and options that exist listed in the help."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration in Hydra's grammar")
    command = parser.prog.split()[-1]
    groups = ("recipe", "topology", "model", "data", "algorithm", "quantization", "rollout", "sync", "reward", "cluster", "logging")
    listing = "\n".join(f"  {group:14}{', '.join(group_options(group))}" for group in groups)
    parser.epilog = f"""Groups and their options:
{listing}

Examples:
  qurl {command} recipe=quickstart
  qurl {command} recipe=quickstart quantization=fp8 rollout.max_staleness=1 run_name=fp8
  qurl {command} recipe=runs/quickstart/config.yaml seed=1 run_name=seed1
  qurl {command} model.path=Qwen/Qwen2.5-0.5B-Instruct data=gsm8k rollout.engine_args.max_num_seqs=64"""


def validated(overrides: list[str]) -> TrainConfig:
    """Compose and validate. Raises ConfigError."""
    config = compose(overrides)
    validate(config)
    return config
