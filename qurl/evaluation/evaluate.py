"""The driver of `qurl eval`: check, start engines and verifiers, sample what the journal lacks, compute the figures.

Every problem's seeds depend on the seed of the evaluation, the benchmark and the problem alone, so a problem sampled again after a
kill draws the same numbers. The samples are the same, too, as far as the engine's arithmetic does not depend on what else is in
the batch."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from qurl import hardware
from qurl.config import RewardConfig, TrainConfig
from qurl.errors import ConfigError
from qurl.evaluation.config import FREE_FIELDS, EvalConfig, validate
from qurl.evaluation.journal import Journal
from qurl.evaluation.problems import fingerprint, is_run, load_prompts, parts_config, reward_config
from qurl.evaluation.record import record_of
from qurl.evaluation.speed import Speed
from qurl.evaluation.summary import summarize
from qurl.evaluation.wording import in_options
from qurl.learner.huggingface import check_weight_files
from qurl.plan.architecture import check_head_size
from qurl.plan.model_facts import read_model_facts
from qurl.plan.preflight import check_engine_args, check_model
from qurl.plug import resolve
from qurl.processes import ending_at_once
from qurl.quantization import FORMATS, resolved_format
from qurl.rewards import REWARDS, VOTES, RewardPool, payable
from qurl.rollout.request import Sampling
from qurl.trainer.export import export_run, latest_checkpoint
from qurl.trainer.prepare import check_vocabulary, load_tokenizer, stop_token_ids
from qurl.types import Prompt

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]  # (done, total) problems, how fast and for how long
POLL_S = 1.0
"""Seconds between two questions to the engines, how many tokens they have."""


def run_evaluation(config: EvalConfig, progress: Progress) -> tuple[dict[str, Any], Path]:
    """Evaluate, or go on where an earlier process of the same command ended. Returns the results and the path of results.json.

    Raises ConfigError or ValueError for what the user must change, before Ray or vLLM start."""
    with ending_at_once(), in_options():  # nothing has begun
        import qurl.trainer.start  # noqa: F401  that sampling imports; an interrupt would be lost in it

        config, (parts, checkpoint, tokenizer, prompts, stop_ids) = _prepared(config)
    with Journal(output_folder(config), saved_config(config, checkpoint, prompts)) as journal:
        missing = {n: [p for p in items if (n, p.prompt_id) not in journal.done] for n, items in prompts.items()}
        total = sum(map(len, prompts.values()))
        progress(total - sum(map(len, missing.values())), total, "starting")
        if any(missing.values()):
            if checkpoint is not None:
                parts = replace(parts, model=replace(parts.model, path=str(_exported(config, journal.folder))))
            _sample(config, parts, missing, tokenizer, stop_ids, journal, lambda left, speed: progress(total - left, total, speed))
        results = {
            name: summarize(
                [journal.done[name, prompt.prompt_id] for prompt in items],
                ks=sorted(set(config.k)) or [config.samples],
                has_votes=reward_config(config, name).function in VOTES,
                seed=config.seed,
            )
            for name, items in prompts.items()
        }
        return results, journal.write_results(results)


def _prepared(config: EvalConfig) -> tuple[EvalConfig, tuple[TrainConfig, str | None, Any, dict[str, list[Prompt]], list[int]]]:
    """The configuration with the dtype that the device gets, and what _checked returns."""
    validate(config)
    asked, device = config.engine_args.get("dtype", config.dtype), "cuda" if hardware.gpus() else "cpu"
    config = replace(config, dtype=hardware.engine_dtype(asked, device, hardware.detect()))
    return config, _checked(config)


def _checked(config: EvalConfig) -> tuple[TrainConfig, str | None, Any, dict[str, list[Prompt]], list[int]]:
    """Parts, name of the checkpoint (of a run folder), tokenizer, prompts by benchmark and stop tokens; what is cheap is refused
    first, with ValueError."""
    if config.format not in FORMATS:
        raise ConfigError(f"--format {config.format} is unknown; use one of {', '.join(FORMATS)}")
    resolved_format(
        config.format, codebooks=config.codebooks, precision=config.precision, rotation=config.rotation,
        group_size=config.group_size,
    )
    for name in config.benchmarks:
        resolve(REWARDS, reward_config(config, name).function, "--reward")
    device, _ = place_engines(config, len(hardware.gpus()), hardware.num_cores())
    parts = parts_config(config)
    check_engine_args(parts.rollout.engine_args)
    checkpoint = latest_checkpoint(Path(config.model).expanduser()).name if is_run(config.model) else None
    facts = read_model_facts(parts.model, is_trained=False)
    if checkpoint is None:
        check_weight_files(parts.model)
    tokenizer = load_tokenizer(parts)
    prompts = load_prompts(config, tokenizer)
    longest = max(len(prompt.token_ids) for prompt in chain.from_iterable(prompts.values()))
    check_length(config, longest, facts.max_position_embeddings)
    parts = replace(parts, data=replace(parts.data, max_prompt_tokens=longest))
    check_head_size(facts.head_dim, device)
    check_model(parts, facts)
    stop_ids = stop_token_ids(parts, tokenizer)
    check_vocabulary(parts, [stop_ids, *(prompt.token_ids for prompt in chain.from_iterable(prompts.values()))])
    for name, items in prompts.items():
        rewards = reward_config(config, name)
        prompts[name] = payable(rewards, items, f"benchmark {name}", "leave the benchmark out")
    return parts, checkpoint, tokenizer, prompts, stop_ids


def output_folder(config: EvalConfig) -> Path:
    """--out, or evals/<model>-<format>, then -<precision> or the start of the hash of what a file says, -rotation<N> and
    -group<N>."""
    words = [Path(config.model).name, config.format]
    if config.precision:
        by_layer = hashlib.sha256(json.dumps(config.precision).encode()).hexdigest()[:12]
        words.append(config.precision if isinstance(config.precision, str) else by_layer)
    words += [config.codebooks["sha256"][:12]] if config.codebooks else []
    words += [f"rotation{config.rotation}"] if config.rotation else []
    words += [f"group{config.group_size}"] if config.group_size else []
    return Path(config.out or f"evals/{'-'.join(words)}").expanduser()


def saved_config(config: EvalConfig, checkpoint: str | None, prompts: Mapping[str, Sequence[Prompt]]) -> dict[str, Any]:
    """What a later command in the same folder must agree with. The problems count by what they say, not by where they lie."""
    asked = {key: value for key, value in asdict(config).items() if key not in FREE_FIELDS | {"data"}}
    return asked | {"checkpoint": checkpoint, "problems": fingerprint(prompts)}


def place_engines(config: EvalConfig, num_gpus: int, num_cores: int) -> tuple[str, int]:
    """(device, OpenMP threads of an engine). Raises ConfigError where there are too few GPUs, or some that torch does not see."""
    if not num_gpus and (hidden := hardware.hidden_gpus()):
        raise ConfigError(f"the evaluation would run on the CPU: {hidden}, or set CUDA_VISIBLE_DEVICES= to mean it")
    needed = config.engines * config.tensor_parallel_size
    if num_gpus and needed > num_gpus:
        raise ConfigError(
            f"--engines {config.engines} with --tensor-parallel-size {config.tensor_parallel_size} need {needed} GPUs, {num_gpus} "
            "found"
        )
    return ("cuda" if num_gpus else "cpu"), max(1, num_cores // config.engines)


def check_length(config: EvalConfig, longest_prompt: int, positions: int | None) -> None:
    """Raises ConfigError where the longest prompt (tokens) and its response go beyond the model's positions."""
    if positions is not None and longest_prompt + config.max_tokens > positions:
        room = positions - longest_prompt
        raise ConfigError(
            f"--max-tokens {config.max_tokens} after the longest prompt, of {longest_prompt} tokens, exceeds the model's "
            f"{positions} positions; use {f'--max-tokens {room}' if room > 0 else 'a model with more'}"
        )


def _exported(config: EvalConfig, folder: Path) -> Path:
    """The run's checkpoint as a Hugging Face folder; made once, under its name only when it is whole."""
    out, partial = folder / "model", folder / "model.partial"
    if not out.exists():
        import shutil

        shutil.rmtree(partial, ignore_errors=True)
        asyncio.run(export_run(Path(config.model).expanduser(), partial))
        partial.rename(out)
    return out.resolve()


def _sample(
    config: EvalConfig,
    parts: TrainConfig,
    missing: Mapping[str, Sequence[Prompt]],
    tokenizer: Any,
    stop_ids: list[int],
    journal: Journal,
    progress: Callable[[int, str], None],
) -> None:
    """Fill the journal. progress: called with the number of problems that are left, and the speed."""
    from qurl.trainer.start import ray_session

    with ray_session(parts) as ray_logs:
        asyncio.run(_sample_all(config, parts, missing, tokenizer, stop_ids, journal, progress, ray_logs))


async def _sample_all(
    config: EvalConfig,
    parts: TrainConfig,
    missing: Mapping[str, Sequence[Prompt]],
    tokenizer: Any,
    stop_ids: list[int],
    journal: Journal,
    progress: Callable[[int, str], None],
    ray_logs: Path,
) -> None:
    from qurl.rollout.actor import start_engine_actor
    from qurl.rollout.pool import RolloutPool
    from qurl.trainer.start import naming

    device, threads = place_engines(config, len(hardware.gpus()), hardware.num_cores())

    def start_engine(engine_id: str) -> Any:
        return start_engine_actor(
            parts.model, parts.rollout, parts.quantization, engine_id=engine_id, seed=config.seed, threads=threads, device=device,
            max_model_len=parts.longest_tokens, load_weights=True,
            num_gpus=float(config.tensor_parallel_size) if device == "cuda" else 0.0,
        )  # fmt: skip

    async def refresh(engine: Any, adopt: Callable[[], None]) -> None:
        adopt()  # an engine that replaces a lost one has loaded its weights itself

    sampling = Sampling(
        temperature=config.temperature, top_p=config.top_p, top_k=-1, max_tokens=config.max_tokens, stop_token_ids=tuple(stop_ids)
    )
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    pool = RolloutPool(parts.rollout, start_engine, run_seed=config.seed, decode=decode)
    pool.refresh = refresh
    configs: dict[str, RewardConfig] = {(found := reward_config(config, name)).function: found for name in missing}
    verifiers = {function: RewardPool(found) for function, found in configs.items()}
    left = sum(map(len, missing.values()))

    async def watch() -> None:
        while True:
            await asyncio.sleep(POLL_S)
            speed.sampled(time.monotonic(), await pool.num_tokens())
            progress(left, str(speed))

    async def one(name: str, prompt: Prompt) -> None:
        nonlocal left
        function = reward_config(config, name).function
        group = await pool.generate(prompt, sampling, config.samples, request_id=f"eval/{name}/{prompt.prompt_id}")
        scored = await verifiers[function].score(group)
        journal.append(record_of(name, scored, VOTES.get(function)))
        left -= 1
        speed.finished(time.monotonic(), sum(len(rollout.token_ids) for rollout in group.rollouts))
        progress(left, str(speed))

    try:
        with naming("the rollout engine did not start", ray_logs):
            await asyncio.gather(pool.start(), *(verifier.start() for verifier in verifiers.values()))
        pool.mark_ready([])
        speed = Speed(left, config.samples * config.max_tokens, time.monotonic())  # engines have started
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(watch())
            async with asyncio.TaskGroup() as problems:
                for name, items in missing.items():
                    for prompt in items:
                        problems.create_task(one(name, prompt))
            watching.cancel()
    except ExceptionGroup as group:
        first: Exception = group
        while isinstance(first, ExceptionGroup):
            first = first.exceptions[0]
        raise first from group
    finally:
        await asyncio.gather(pool.close(), *(verifier.close() for verifier in verifiers.values()), return_exceptions=True)
