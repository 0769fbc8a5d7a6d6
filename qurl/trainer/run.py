"""`qurl train`: set a run up, train, tear it down.

What can fail cheaply fails first: folder, data, reward function and tokenizer are checked before Ray, vLLM or DeepSpeed start."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qurl.config import TrainConfig
from qurl.config.paths import with_absolute_paths
from qurl.config.placement import with_engine_dtype
from qurl.data import PromptStream, build_prompts, load_rows
from qurl.errors import ConfigError, GuardStop, one_line, remote_cause
from qurl.learner.huggingface import check_weight_files
from qurl.observability.run_logger import RunLogger
from qurl.observability.timeline import Timeline
from qurl.rewards import VOTES, payable
from qurl.trainer.checkpoint import Checkpoints
from qurl.trainer.inputs import Fingerprint, fingerprints
from qurl.trainer.interrupt import Interrupted, held_signals, on_signal
from qurl.trainer.run_folder import RunFolder
from qurl.types import Prompt, RolloutGroup

if TYPE_CHECKING:
    from qurl.trainer.producer import DynamicSampling

logger = logging.getLogger(__name__)

EXIT_DONE, EXIT_FAILED, EXIT_GUARD, EXIT_INTERRUPTED = 0, 1, 3, 130


def run(config: TrainConfig) -> int:
    """Train, or go on where the last checkpoint of this run folder ends. Returns the exit code.

    Raises ConfigError or ValueError for what the user must change, before anything heavy starts."""
    config = with_engine_dtype(config)
    with RunFolder(config) as folder:
        config = with_absolute_paths(config)  # config.yaml keeps the user's spelling
        checkpoints = Checkpoints(folder.path, config.checkpoint.keep_last)
        resume_from = checkpoints.latest()
        state = checkpoints.state(resume_from) if resume_from else None
        if state is not None and state["step"] > config.num_steps:
            raise ConfigError(f"num_steps={config.num_steps}: {folder.path} is already trained for {state['step']} steps; "
                              "raise num_steps or choose another run_name")  # fmt: skip
        if state is not None and state["step"] == config.num_steps and not _evaluation_is_left(config, state):
            logger.warning("%s is trained for all %d steps; raise num_steps to go on", folder.path, config.num_steps)
            return EXIT_DONE
        check_weight_files(config.model)
        if config.algorithm.uses_critic:
            check_weight_files(config.critic.model(config.model), "critic")
        tokenizer = load_tokenizer(config)
        prompts, evaluation = load_prompts(config, tokenizer)
        stop_ids = stop_token_ids(config, tokenizer)
        check_vocabulary(config, [stop_ids, *(p.token_ids for p in [*prompts, *chain.from_iterable(evaluation.values())])])
        stream = PromptStream(prompts, seed=config.seed, shuffle=config.data.shuffle)
        inputs = fingerprints(config, prompts, evaluation)
        if state is not None:
            folder.refuse_other_inputs(state, inputs)
            stream.load_state_dict(state["stream"])
        log = RunLogger(folder.path, config.logging, config.num_steps, folder.resolved)
        try:
            from qurl.trainer.start import ray_session

            log.stage("start")
            with ray_session(config) as ray_logs, held_signals():
                return asyncio.run(_train(config, folder, ray_logs, checkpoints, resume_from, state, tokenizer, stop_ids,
                                          stream, evaluation, inputs, log))  # fmt: skip
        except Interrupted:
            return EXIT_INTERRUPTED
        except asyncio.CancelledError:
            logger.warning("ended without a checkpoint")
            return EXIT_INTERRUPTED
        except Exception as error:  # whatever ends a run is one line for the user; log.txt has the whole of it
            logger.info("what ended the run", exc_info=error)
            return end(remote_cause(error), checkpoints)
        finally:
            log.close()


def _evaluation_is_left(config: TrainConfig, state: dict[str, Any]) -> bool:
    """Whether the process that saved `state` ended before the evaluation that was due there."""
    is_due = bool(config.data.eval) and config.evaluation.is_due(state["step"], config.num_steps)
    return is_due and _evaluated(state) != state["step"]


def _evaluated(state: dict[str, Any]) -> int:
    return int(state.get("evaluated", state["step"]))  # a checkpoint that does not say was written after its evaluation


def end(error: BaseException, checkpoints: Checkpoints) -> int:
    """Report what ended the run. Raises it where it is the user's to change."""
    if isinstance(error, ValueError):
        raise error
    if isinstance(error, GuardStop):
        logger.error("stopped: %s", error)
        return EXIT_GUARD
    hint = "; the same command goes on from the last checkpoint" if checkpoints.latest() else ""
    logger.error("%s%s", one_line(error), hint)  # a learner died, the disk is full: the world, not the user
    return EXIT_FAILED


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


async def _train(
    config: TrainConfig,
    folder: RunFolder,
    ray_logs: Path,
    checkpoints: Checkpoints,
    resume_from: Path | None,
    state: dict[str, Any] | None,
    tokenizer: Any,
    stop_ids: list[int],
    stream: PromptStream,
    evaluation: dict[str, list[Prompt]],
    inputs: dict[str, Fingerprint],
    log: RunLogger,
) -> int:
    from qurl.rollout.pool import training_sampling
    from qurl.trainer.agreement import NUM_PROMPTS, check_agreement
    from qurl.trainer.evaluate import evaluate, evaluation_sampling
    from qurl.trainer.gpus import reserved_gpus
    from qurl.trainer.guard import Guard, fallback
    from qurl.trainer.loop import TrainingLoop
    from qurl.trainer.producer import Producer
    from qurl.trainer.start import engine_starter, started_parts
    from qurl.trainer.weights import PublishedWeights

    run_dir = folder.path
    completed, evaluated, guard = 0, -1, Guard(config.guard)
    if state is not None:
        completed, evaluated = state["step"], _evaluated(state)
        guard.load_state_dict(state["guard"])
        log.load_state_dict(state["logger"])
        logger.info("going on after step %d of %s", completed, run_dir)
    other = fallback(config.guard.action, config.quantization)
    interrupt = asyncio.Event()
    on_signal(interrupt)
    timeline = Timeline(run_dir / "timeline.json")
    async with reserved_gpus(config, interrupt) as gpus, started_parts(
        config, run_dir, ray_logs, gpus, tokenizer, resume_from, interrupt, fallback=other if guard.fallen_back else None
    ) as (learner, pool, rewards):  # fmt: skip
        weights = PublishedWeights(config.sync, learner, pool, partial(engine_starter, config, gpus), config.quantization, other)

        def sample(prompt: Prompt, step: int) -> Coroutine[Any, Any, RolloutGroup]:
            rollout = config.rollout_at(step)
            sampling = training_sampling(rollout, stop_ids)
            return pool.generate(prompt, sampling, rollout.num_samples_per_prompt, request_id=f"train/{prompt.prompt_id}")

        producer = Producer(
            stream=stream,
            num_prompts_per_step=lambda step: config.rollout_at(step).num_prompts_per_step,
            max_staleness=config.rollout.max_staleness,
            first_step=completed,
            num_steps=config.num_steps,
            wait_for_version=weights.wait_for,
            sample=sample,
            score=rewards.score,
            dynamic_sampling=_dynamic_sampling(config),
        )
        longest = replace(config.rollout, max_response_tokens=config.longest_rollout_tokens)
        evaluator = partial(
            evaluate,
            evaluation,
            pool=pool,
            score=rewards.score,
            sampling=evaluation_sampling(config.evaluation, longest, stop_ids),
            num_samples=config.evaluation.num_samples_per_prompt,
            vote=VOTES.get(config.reward.function),
        )
        loop = TrainingLoop(
            config=config, learner=learner, pool=pool, weights=weights, producer=producer, checkpoints=checkpoints, log=log,
            timeline=timeline, guard=guard, interrupt=interrupt, completed=completed, evaluated=evaluated,
            evaluate=evaluator if evaluation else None, inputs=inputs,
            check_agreement=partial(check_agreement, config, stream.first(NUM_PROMPTS), pool, learner, weights),
        )  # fmt: skip
        folder.write_config()
        try:
            await loop.run()
        except Interrupted:
            logger.warning("interrupted after step %d; the same command goes on from here", loop.completed)
            raise
        finally:
            await producer.close()
    return EXIT_DONE


def _dynamic_sampling(config: TrainConfig) -> DynamicSampling | None:
    from qurl.trainer.batch import check_reward_errors, is_informative
    from qurl.trainer.producer import DynamicSampling

    if not config.algorithm.dynamic_sampling.enabled:
        return None
    return DynamicSampling(
        config=config.algorithm.dynamic_sampling,
        is_informative=partial(is_informative, config=config.algorithm),
        check=partial(check_reward_errors, max_error_fraction=config.reward.max_error_fraction),
    )


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
