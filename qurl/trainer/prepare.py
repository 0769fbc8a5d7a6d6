"""Whatever a run reads before Ray, vLLM or DeepSpeed start: weights, tokenizer, problems, reward. `qurl plan` reads the same."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from qurl.config import TrainConfig
from qurl.data import build_prompts, load_rows
from qurl.data.readers import is_file_name
from qurl.errors import ConfigError
from qurl.learner.huggingface import check_weight_files
from qurl.rewards import payable
from qurl.types import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What is read before a run starts."""

    tokenizer: Any
    prompts: list[Prompt]  # of training
    evaluation: dict[str, list[Prompt]]
    stop_ids: list[int]


def prepare(config: TrainConfig) -> Prepared:
    """Read and check weight files, tokenizer, prompts and reward. Raises ConfigError or ValueError for what cannot be used."""
    check_weight_files(config.model)
    if config.algorithm.uses_critic:
        check_weight_files(config.critic.model(config.model), "critic")
    tokenizer = load_tokenizer(config)
    prompts, evaluation = load_prompts(config, tokenizer)
    stop_ids = stop_token_ids(config, tokenizer)
    check_vocabulary(config, [stop_ids, *(p.token_ids for p in [*prompts, *chain.from_iterable(evaluation.values())])])
    return Prepared(tokenizer=tokenizer, prompts=prompts, evaluation=evaluation, stop_ids=stop_ids)


def not_here(config: TrainConfig) -> str | None:
    """Return what of a run is not on this machine, so that a plan for another machine cannot try it; None where all is here."""
    tokenizer = config.model.tokenizer or config.model.path
    if not any(Path(tokenizer).glob("tokenizer*")):
        return f"the tokenizer of {tokenizer}"
    if not any(Path(config.model.path).glob(pattern) for pattern in ("*.safetensors", "*.bin")):
        return f"the weights of model.path={config.model.path}"
    for dataset in (config.data.train, *config.data.eval.values()):
        for path in dataset.paths:
            if not is_file_name(path):
                return f"the hub dataset {path}"
    return None


def is_bare(config: TrainConfig) -> bool:
    """Return whether model.path is a folder that describes a model by its config.json alone, which is enough for a plan."""
    folder = Path(config.model.path)
    return folder.is_dir() and {file.name for file in folder.iterdir()} <= {"config.json", "generation_config.json"}


def load_tokenizer(config: TrainConfig) -> Any:
    """The policy's tokenizer. Raises ConfigError where it cannot be loaded."""
    from transformers import AutoTokenizer

    key, path = ("model.tokenizer", config.model.tokenizer) if config.model.tokenizer else ("model.path", config.model.path)
    try:
        return AutoTokenizer.from_pretrained(path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={path}: no tokenizer could be loaded ({str(error).splitlines()[0]})") from error


def load_prompts(config: TrainConfig, tokenizer: Any) -> tuple[list[Prompt], dict[str, list[Prompt]]]:
    """Training prompts and evaluation prompts by name; the reward can pay the ground truth of each, see qurl.rewards.payment."""

    def load(dataset: Any, key: str) -> list[Prompt]:
        problems = load_rows(dataset, key)
        found = build_prompts(problems, tokenizer, config.data, key)
        prompts = payable(config.reward, found.prompts, f"{key}.path={dataset.path}")
        if found.num_dropped:
            logger.warning("%s: %d of %d prompts are longer than data.max_prompt_tokens=%d and were dropped",
                           key, found.num_dropped, len(problems), config.data.max_prompt_tokens)  # fmt: skip
        return prompts

    train = load(config.data.train, "data.train")
    return train, {name: load(dataset, f"data.eval.{name}") for name, dataset in config.data.eval.items()}


def check_vocabulary(config: TrainConfig, token_ids: Iterable[list[int]]) -> None:
    """Raises ConfigError where the tokenizer made tokens that the model does not have."""
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(
        config.model.path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
    )
    size, largest = found.get_text_config().vocab_size, max(map(max, token_ids))
    if largest >= size:
        tokenizer = config.model.tokenizer or config.model.path
        raise ConfigError(f"model.tokenizer={tokenizer} is another model's: it makes token {largest}, the vocabulary of "
                          f"model.path={config.model.path} has {size}")  # fmt: skip


def stop_token_ids(config: TrainConfig, tokenizer: Any) -> list[int]:
    """The tokenizer's end of sequence and those of the model's generation config. Raises ConfigError where there is none."""
    from transformers import GenerationConfig

    found: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    try:
        eos = GenerationConfig.from_pretrained(config.model.path, revision=config.model.revision or "main").eos_token_id
    except OSError:  # the file is optional
        eos = None
    found |= set(eos) if isinstance(eos, list) else set() if eos is None else {eos}
    if not found and not config.rollout.stop_token_ids:
        raise ConfigError(f"model.path={config.model.path!r}: neither tokenizer nor generation config names an end of sequence; "
                          "set rollout.stop_token_ids")  # fmt: skip
    return sorted(found)
