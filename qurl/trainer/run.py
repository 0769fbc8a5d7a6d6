"""`qurl train`: set a run up, train, tear it down.

What can fail cheaply fails first: folder, data, reward function and tokenizer are checked before Ray, vLLM or DeepSpeed start."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qurl.config import TrainConfig
from qurl.config.paths import with_absolute_paths
from qurl.config.placement import with_engine_dtype
from qurl.data import PromptStream
from qurl.errors import ConfigError, GuardStop, one_line, remote_cause
from qurl.observability.run_logger import RunLogger
from qurl.observability.timeline import Timeline
from qurl.rewards import VOTES
from qurl.trainer.checkpoint import Checkpoints
from qurl.trainer.inputs import Fingerprint, fingerprints
from qurl.trainer.interrupt import Interrupted, held_signals, on_signal
from qurl.trainer.prepare import prepare
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
        found = prepare(config)
        tokenizer, prompts, evaluation, stop_ids = found.tokenizer, found.prompts, found.evaluation, found.stop_ids
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
        starter = partial(engine_starter, config, gpus, learner)
        weights = PublishedWeights(config.sync, learner, pool, starter, config.quantization, other)

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
