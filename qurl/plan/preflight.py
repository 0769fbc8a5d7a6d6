"""What a configuration needs from the tables and files around it: names, datasets, the model's shape."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from qurl.algorithms import ADVANTAGES, CORRECTIONS, POLICY_LOSSES
from qurl.config.data import DatasetConfig
from qurl.config.guard import GuardAction
from qurl.config.quantization import UpdateAwareness
from qurl.config.run import TrainConfig
from qurl.data.files import files_of
from qurl.data.readers import is_file_name
from qurl.errors import ConfigError
from qurl.learner.deepspeed_config import deepspeed_config, known_deepspeed_keys
from qurl.plan.model_facts import HUB_NAME, ModelFacts
from qurl.plug import resolve
from qurl.quantization import FORMATS, resolved_format, select_targets, with_precision
from qurl.quantization.axbxp import ALL_BLOCKS, AxBxP
from qurl.quantization.base import QuantizationFormat
from qurl.rewards import REWARDS, check_reward_function
from qurl.rollout.vllm_engine import CONTROLLED_ARGS, known_engine_args


def check_names(config: TrainConfig) -> None:
    """Every plug point answers to its name and no foreign argument is one of ours. Raises ValueError with the key."""
    algorithm = config.algorithm
    _check_plug(ADVANTAGES, algorithm.advantage.name, "algorithm.advantage.name", "groups", "config")
    _check_plug(CORRECTIONS, algorithm.correction.name, "algorithm.correction.name", "inputs", "config")
    _check_plug(POLICY_LOSSES, algorithm.policy_loss.name, "algorithm.policy_loss.name", "inputs", "config")
    if config.reward.function not in REWARDS:
        check_reward_function(config.reward)
    if config.quantization.format not in FORMATS:
        raise ConfigError(f"quantization.format={config.quantization.format} is unknown; use one of {', '.join(FORMATS)}")
    name, awareness = config.quantization.format, config.quantization.update_awareness
    if awareness is UpdateAwareness.stochastic_rounding and not FORMATS[name].rounds_stochastically:
        able = ", ".join(name for name, quantization in FORMATS.items() if quantization.rounds_stochastically)
        raise ConfigError(f"quantization.update_awareness=stochastic_rounding is not possible with {name}; use quantization={able}")
    given = config.quantization
    resolved_format(name, codebooks=given.codebooks, precision=given.precision, rotation=given.rotation,
                    group_size=given.group_size)  # fmt: skip
    deepspeed_config(config.learner, 1)
    check_engine_args(config.rollout.engine_args)
    if config.learner.deepspeed:
        _check_foreign("learner.deepspeed", config.learner.deepspeed, known_deepspeed_keys(), "key of DeepSpeed's configuration")


def check_engine_args(arguments: Mapping[str, Any]) -> None:
    """vLLM knows the names of `rollout.engine_args`, and none of them is ours to set. Raises ConfigError."""
    for name in sorted(CONTROLLED_ARGS & set(arguments)):
        raise ConfigError(f"rollout.engine_args.{name} is set by qurl itself from other keys; remove it")
    if arguments:
        _check_foreign("rollout.engine_args", arguments, known_engine_args(), "argument of vLLM's engine")


def _check_foreign(key: str, given: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    """Refuse names that another library would not know."""
    for name in sorted(given.keys() - known):
        near = difflib.get_close_matches(name, sorted(known), n=3)
        raise ConfigError(f"{key}.{name} is no {what}" + (f"; did you mean {' or '.join(near)}?" if near else ""))


def _check_plug(table: Mapping[str, Any], name: str, key: str, *arguments: str) -> None:
    """The plug point can be called as its contract says. Raises ValueError."""
    function = resolve(table, name, key)
    if not callable(function):
        raise ConfigError(f"{key}={name!r} is a {type(function).__name__}, not a function")
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"{key}={name!r} cannot be called with ({', '.join(arguments)}): {error}") from error


def check_datasets(config: TrainConfig) -> None:
    """Local files exist and everything else looks like a hub dataset. Raises ConfigError."""
    _check_dataset(config.data.train, "data.train.path")
    for name, dataset in config.data.eval.items():
        _check_dataset(dataset, f"data.eval.{name}.path")


def _check_dataset(dataset: DatasetConfig, key: str) -> None:
    for path in dataset.paths:
        label = f"{key}={path}"
        try:
            if is_file_name(path):
                files_of(path, label)
            elif not HUB_NAME.fullmatch(path):
                raise ConfigError(f"{label} is neither a file nor the name of a hub dataset")
        except ValueError as error:
            if "no such file" not in str(error):
                raise ConfigError(str(error)) from error
            remedy = "`qurl prepare NAME` makes a recipe's data, or give a hub dataset"
            raise ConfigError(f"{label} does not exist (the current folder is {Path.cwd()}); {remedy}") from error


def check_model(config: TrainConfig, model: ModelFacts) -> frozenset[str]:
    """The model can be split and quantized as asked, and is long enough. Returns the modules that become low precision.

    Raises ValueError with the key."""
    size = config.rollout.tensor_parallel_size
    if model.num_heads % size:
        divisors = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0]
        raise ConfigError(
            f"rollout.tensor_parallel_size={size} does not divide the model's {model.num_heads} attention heads; "
            f"use one of {', '.join(map(str, divisors))}"
        )
    if model.num_kv_heads % size and size % model.num_kv_heads:
        raise ConfigError(
            f"rollout.tensor_parallel_size={size} and the model's {model.num_kv_heads} key-value heads: one must divide the other"
        )
    if model.intermediate_size % size:  # vLLM asserts it while it builds the layers
        raise ConfigError(
            f"rollout.tensor_parallel_size={size} does not divide the {model.intermediate_size} channels of the model's MLP layers"
        )
    longest = config.longest_tokens
    if model.max_position_embeddings is not None and longest > model.max_position_embeddings:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_response_tokens (or evaluation's, or that of stages) = {longest} exceeds the "
            f"model's {model.max_position_embeddings} positions; lower one of them, or raise model.max_position_embeddings "
            "where its rotary embeddings go further"
        )
    limit = config.rollout.engine_args.get("max_model_len")
    if limit is not None and limit < longest:
        raise ConfigError(
            f"rollout.engine_args.max_model_len={limit} is shorter than data.max_prompt_tokens + rollout.max_response_tokens (or "
            f"evaluation's, or that of stages) = {longest}, which is its default; remove it"
        )
    beyond = [token for token in config.rollout.stop_token_ids if token >= model.vocab_size]
    if beyond:
        raise ConfigError(f"rollout.stop_token_ids={beyond[0]} is no token of the model, whose vocabulary has {model.vocab_size}")
    if config.quantization.format == "none":
        return frozenset()
    experts = [name for name in model.parameters if ".experts." in name]
    if experts:
        name = config.quantization.format
        raise ConfigError(f"quantization={name}: mixtures of experts are not supported ({experts[0]}); use quantization=none")
    targets = select_targets(model.linear_names, config.quantization.ignore)
    quantization = config.quantization
    format = resolved_format(
        quantization.format, codebooks=quantization.codebooks, precision=quantization.precision, rotation=quantization.rotation,
        group_size=quantization.group_size, layers=sorted(targets),
    )
    for name in sorted(targets):
        try:
            format.check_columns(model.parameters[f"{name}.weight"][1])
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error
        _check_part(format, name, model, size)
    return targets


def _check_part(format: QuantizationFormat, name: str, model: ModelFacts, size: int) -> None:
    """The format can be cut as an engine of `size` ranks cuts a linear layer. Raises ConfigError."""
    rows, columns = model.parameters[f"{name}.weight"]
    copied = name.endswith(("k_proj", "v_proj"))  # heads that are fewer than the ranks lie on several whole
    rows //= min(size, model.num_kv_heads) if copied else size
    try:
        if size > 1:
            format.check_part(*((0, columns // size) if name in model.divided_inputs else (rows, 0)))
    except ValueError as error:
        raise ConfigError(f"rollout.tensor_parallel_size={size} cuts {name} into parts: {error}") from error


def check_raised_precision(config: TrainConfig, targets: frozenset[str], device: str) -> None:
    """guard.action=raise_precision has blocks to add, which engines on `device` can do while they live. Raises ConfigError."""
    if config.guard.action is not GuardAction.raise_precision:
        return
    format, setting = FORMATS[config.quantization.format], config.quantization.precision
    assigned = with_precision(format, setting, sorted(targets))
    precisions = sorted({cast(AxBxP, assigned.of_layer(name)).precision for name in targets}, key=str)
    remedy = "or guard.action=full_precision"
    if all(precision.keeps_all for precision in precisions):
        raise ConfigError(
            f"guard.action=raise_precision cannot run: quantization.precision={setting} keeps all blocks already; use one that "
            f"drops some, e.g. {cast(AxBxP, format).precision}, {remedy}"
        )
    fixed = [precision for precision in precisions if precision.structure != ALL_BLOCKS.structure]
    if device == "cuda" and fixed:
        raise ConfigError(
            f"guard.action=raise_precision cannot run: an engine on a GPU, whose graphs have been captured, cannot change from "
            f"quantization.precision={fixed[0]} to {ALL_BLOCKS}; use activations without a group or with g1 and no -noll, {remedy}"
        )
