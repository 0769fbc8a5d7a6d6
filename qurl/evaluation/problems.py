"""The prompts of an evaluation, and the configurations of the parts that sample and judge them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qurl.config import (
    ControlTokens,
    DataConfig,
    ModelConfig,
    OverlongPrompts,
    QuantizationConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
)
from qurl.config.compose import load_config
from qurl.data import build_prompts
from qurl.errors import ConfigError
from qurl.evaluation.benchmarks import BENCHMARKS, PROMPTS, load_problems
from qurl.evaluation.config import EvalConfig
from qurl.types import Prompt


def parts_config(config: EvalConfig) -> TrainConfig:
    """Model, engines and rewards in the words of a run; of a run folder, its own model with that model's tokenizer."""
    run = is_run(config.model)
    return TrainConfig(
        seed=config.seed,
        model=_model_of_run(Path(config.model).expanduser()) if run else ModelConfig(path=config.model),
        quantization=QuantizationConfig(
            format=config.format, ignore=config.ignore, precision=config.precision, codebooks=config.codebooks,
            rotation=config.rotation,
            group_size=config.group_size,
        ),
        rollout=RolloutConfig(
            num_engines=config.engines, tensor_parallel_size=config.tensor_parallel_size, engine_args=config.engine_args,
            max_response_tokens=config.max_tokens, dtype=config.dtype,
        ),
        data=DataConfig(max_prompt_tokens=config.max_prompt_tokens, overlong_prompts=OverlongPrompts.error),
    )  # fmt: skip


def _model_of_run(folder: Path) -> ModelConfig:
    """Return the model of a run; a relative path of it was meant from the folder in which the run was started.

    That folder is the one from which output_dir and run_name lead to the run."""
    run = load_config(folder / "config.yaml")
    tail = Path(run.output_dir, run.run_name)
    if tail.is_absolute() or folder.resolve().parts[-len(tail.parts) :] != tail.parts:
        return run.model
    start = folder.resolve().parents[len(tail.parts) - 1]

    def found(path: str) -> str:
        return str(start / path) if (start / path).is_dir() else path

    return replace(run.model, path=found(run.model.path), tokenizer=run.model.tokenizer and found(run.model.tokenizer))


def is_run(model: str) -> bool:
    """Whether `model` is the folder of a run rather than a Hugging Face folder or a hub name."""
    return (Path(model).expanduser() / "config.yaml").is_file()


def reward_config(config: EvalConfig, benchmark: str) -> RewardConfig:
    """How a benchmark's answers are judged."""
    function = config.reward or BENCHMARKS[benchmark].reward
    return RewardConfig(
        function=function, kwargs=config.reward_kwargs, num_workers=config.reward_workers, timeout_s=config.reward_timeout_s
    )


def load_prompts(config: EvalConfig, tokenizer: Any) -> dict[str, list[Prompt]]:
    """Benchmark -> its prompts in stored order. Raises ConfigError or ValueError for data or options that do not fit."""
    has_template = bool(tokenizer.chat_template)
    if config.chat_template and not has_template:
        raise ConfigError(f"--chat-template: the tokenizer of {config.model} has none; use --no-chat-template")
    prompts = {}
    for name in config.benchmarks:
        key = f"--data {name}" if name in config.data else f"benchmark {name}"
        template = config.prompt or BENCHMARKS[name].prompt
        data = DataConfig(
            prompt_template=PROMPTS.get(template, template),
            chat_template=has_template if config.chat_template is None else config.chat_template,
            chat_template_kwargs=config.chat_template_kwargs,
            control_tokens=ControlTokens[config.control_tokens],
            max_prompt_tokens=config.max_prompt_tokens,
            overlong_prompts=OverlongPrompts.error,
        )
        prompts[name] = build_prompts(load_problems(name, config.data.get(name), config.max_problems), tokenizer, data, key).prompts
    return prompts


def fingerprint(prompts: Mapping[str, Sequence[Prompt]]) -> dict[str, str]:
    """Benchmark -> hash of what is asked and expected, so that a journal never mixes two versions of a benchmark."""
    found = {}
    for name, items in prompts.items():
        digest = hashlib.blake2b(digest_size=8)
        for prompt in items:
            digest.update(json.dumps([prompt.prompt_id, prompt.token_ids, prompt.ground_truth]).encode())
        found[name] = digest.hexdigest()
    return found
