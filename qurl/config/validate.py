"""What a configuration must satisfy by itself: value ranges and pairs of keys. Standard library only, so it answers at once.

What depends on the machine, the model, files or plug tables is checked in qurl.plan."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

from qurl.config.algorithm import (
    GAE,
    AdvantageConfig,
    Aggregation,
    AlgorithmConfig,
    CorrectionConfig,
    DynamicSamplingConfig,
    KLPlacement,
    PolicyLossConfig,
    Rejection,
)
from qurl.config.critic import CriticConfig
from qurl.config.data import DataConfig
from qurl.config.guard import GuardAction, GuardConfig
from qurl.config.learner import LearnerConfig
from qurl.config.probe import ProbeConfig
from qurl.config.quantization import QuantizationConfig, UpdateAwareness
from qurl.config.reward import RewardConfig
from qurl.config.rollout import RolloutConfig
from qurl.config.run import CheckpointConfig, ClusterConfig, Device, EvaluationConfig, LoggingConfig, TrainConfig
from qurl.config.sync import SyncConfig
from qurl.errors import ConfigError

TRANSPORTS = {  # qurl.sync.TRANSPORTS by the device that they run on; sync itself needs torch and Ray
    "auto": (Device.auto, Device.cpu, Device.cuda),
    "object_store": (Device.auto, Device.cpu, Device.cuda),
    "shared_memory": (Device.auto, Device.cpu, Device.cuda),
    "gloo": (Device.auto, Device.cpu, Device.cuda),
    "nccl": (Device.auto, Device.cuda),
    "cuda_ipc": (Device.auto, Device.cuda),
}


COUNTED_ARGS = {"max_num_seqs", "max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes"}
"""Engine arguments that planning computes with, or that fail deep in vLLM where they are no positive whole number."""

UNKNOWN_TO_THE_LEARNER = {
    "logits_processors": "the learner cannot follow it, only rollout.temperature, top_p and top_k",
    "override_generation_config": "only rollout.temperature, top_p, top_k and stop_token_ids say how tokens are sampled",
    "watermark": "the learner cannot follow it, only rollout.temperature, top_p and top_k",
    "watermark_config": "the learner cannot follow it, only rollout.temperature, top_p and top_k",
    "diffusion_config": "the learner scores tokens from left to right, with rollout.temperature, top_p and top_k",
}
"""Engine arguments that change the distribution that is sampled from, or seem to; why training refuses each."""

RELATIVE_TO_THE_GROUP = ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline")
"""Advantages that compare a rollout with the others of its prompt."""

MAX_SEED = 2**32 - 1  # numpy's


def validate(config: TrainConfig) -> None:
    """Raises ConfigError, naming the key and a value that works, for the first thing that cannot run."""
    _run(config)
    _data(config.data)
    _algorithm(config.algorithm)
    _quantization(config.quantization)
    _rollout(config.rollout)
    _learner(config.learner)
    _critic(config)
    _sync(config.sync)
    _reward(config.reward)
    _probe(config.probe)
    _guard(config.guard, config.quantization)
    _evaluation(config.evaluation)
    _periphery(config.checkpoint, config.cluster, config.logging)
    _batch(config)
    _stages(config)
    check_devices(config, config.cluster.device)


def _require(holds: bool, key: str, value: Any, needs: str) -> None:
    if not holds:
        raise ConfigError(f"{key}={value} cannot run; use {needs}")


def _at_least(low: float, section: str, config: Any, *names: str) -> None:
    """Every named field is a finite number >= low."""
    for name in names:
        value = getattr(config, name)
        _require(math.isfinite(value) and value >= low, f"{section}{name}", value, f"a number >= {low}")


def _positive(section: str, config: Any, *names: str) -> None:
    """Every named field is a finite number > 0."""
    for name in names:
        value = getattr(config, name)
        _require(math.isfinite(value) and value > 0, f"{section}{name}", value, "a number > 0")


def _unchanged(section: str, config: Any, default: Any, needs: str) -> None:
    """Every field has its default."""
    for name in (field.name for field in fields(config)):
        _require(getattr(config, name) == getattr(default, name), f"{section}{name}", getattr(config, name), needs)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _run(config: TrainConfig) -> None:
    _at_least(1, "", config, "num_steps")
    _require(0 <= config.seed <= MAX_SEED, "seed", config.seed, f"a number from 0 to {MAX_SEED}")
    name = config.run_name
    _require(bool(name) and name not in (".", "..") and "/" not in name, "run_name", repr(name), "a folder name without /")
    _require(bool(config.output_dir), "output_dir", "''", "a folder, e.g. runs")
    positions = config.model.max_position_embeddings
    _require(positions is None or positions >= 1, "model.max_position_embeddings", positions, "null or a number >= 1")
    _require(bool(config.model.path), "model.path", "''", "a local folder or a hub name such as Qwen/Qwen2.5-0.5B-Instruct")


def _data(config: DataConfig) -> None:
    works = "a .jsonl, .json, .csv or .parquet file, a pattern such as shards/*.parquet, a hub dataset, or a list of these"
    _require(bool(config.train.path), "data.train.path", "''", f"{works}; or data=gsm8k")
    for name, dataset in [("train", config.train), *((f"eval.{name}", dataset) for name, dataset in config.eval.items())]:
        path = dataset.path
        is_text = isinstance(path, str) or (isinstance(path, list) and all(isinstance(part, str) for part in path))
        _require(is_text and bool(path), f"data.{name}.path", repr(path), works)
        rows = dataset.max_rows
        _require(rows is None or rows >= 1, f"data.{name}.max_rows", rows, "null or a number >= 1")
    _at_least(1, "data.", config, "max_prompt_tokens")
    prompt = config.system_prompt
    _require(prompt is None or config.chat_template, "data.system_prompt", repr(prompt), "it with data.chat_template=true, or null")


def _algorithm(config: AlgorithmConfig) -> None:
    _correction(config.correction)
    _policy_loss(config.policy_loss)
    _at_least(0, "algorithm.kl.", config.kl, "coefficient")
    _overlong(config)
    _dynamic_sampling(config.dynamic_sampling)
    in_loss = config.kl.placement is KLPlacement.loss
    exists = config.kl.coefficient > 0
    _require(in_loss or exists, "algorithm.kl.placement", "reward", "loss, or algorithm.kl.coefficient > 0 with it")
    _at_least(0, "algorithm.", config, "entropy_coefficient")


def _overlong(config: AlgorithmConfig) -> None:
    _at_least(0, "algorithm.overlong.", config.overlong, "penalty_tokens", "penalty")
    filtered = config.overlong.filter and config.kl.placement is KLPlacement.reward  # advantages are then of trained rollouts alone
    _require(not filtered, "algorithm.overlong.filter", "true", "algorithm.kl.placement=loss with it")


def _dynamic_sampling(config: DynamicSamplingConfig) -> None:
    _at_least(1, "algorithm.dynamic_sampling.", config, "max_generations")
    prompts = config.num_prompts_per_generation
    works = "null (as many as rollout.num_prompts_per_step) or a number >= 1"
    _require(prompts is None or prompts >= 1, "algorithm.dynamic_sampling.num_prompts_per_generation", prompts, works)


def _correction(config: CorrectionConfig) -> None:
    section = "algorithm.correction."
    _positive(section, config, "truncation")
    _at_least(1, section, config, "max_clip_scale")
    rejects = config.rejection is not Rejection.none
    by_itself = config.name == "icepop"
    fits = not by_itself or config.rejection in (Rejection.none, Rejection.token)
    _require(fits, f"{section}rejection", config.rejection.name, "none with algorithm.correction.name=icepop, which rejects tokens")
    for name in ("rejection_low", "rejection_high"):
        value = getattr(config, name)
        if value is not None:
            _at_least(0, section, config, name)
            _require(rejects or by_itself, f"{section}{name}", value, "null with algorithm.correction.rejection=none")
    low, high = (replace(config, rejection=Rejection.token) if by_itself else config).rejection_bounds
    _require(low <= high, f"{section}rejection_low", low, f"a number up to rejection_high = {high:g}")


def _policy_loss(config: PolicyLossConfig) -> None:
    section = "algorithm.policy_loss."
    _require(0 < config.clip_low <= 1, f"{section}clip_low", config.clip_low, "a number in (0, 1], e.g. 0.2")
    _positive(section, config, "clip_high")
    dual, bounds = config.dual_clip, f"a number above 1 + clip_high = {1 + config.clip_high:g}, e.g. 3.0"
    _require(dual is None or dual > 1 + config.clip_high, f"{section}dual_clip", dual, f"null or {bounds}")
    _require(dual is None or config.name != "cispo", f"{section}dual_clip", dual, "null with algorithm.policy_loss.name=cispo")
    constant, is_constant = config.aggregation_constant, config.aggregation is Aggregation.constant
    works = "a number of tokens >= 1 with algorithm.policy_loss.aggregation=constant, e.g. '${rollout.max_response_tokens}'"
    _require(not is_constant or (constant is not None and constant >= 1), f"{section}aggregation_constant", constant, works)
    _require(is_constant or constant is None, f"{section}aggregation_constant", constant, "null, or aggregation=constant with it")


def _quantization(config: QuantizationConfig) -> None:
    _positive("quantization.", config, "invariant_scale")
    awareness = config.update_awareness
    if config.format == "none":
        _require(not config.ignore, "quantization.ignore", config.ignore, "[] with quantization=none, where nothing is quantized")
        _require(awareness is UpdateAwareness.none, "quantization.update_awareness", awareness.name, "none, or quantization=int8")
    key, precision = "quantization.precision", config.precision
    _require(precision is None or config.format == "axbxp", key, precision, "null, or quantization=axbxp with it")
    is_mapping = isinstance(precision, dict) and bool(precision) and all(isinstance(s, str) for s in precision.values())
    works = "a setting such as k2-w2g16-a3g1, a mapping of patterns to settings, or null"
    _require(precision is None or isinstance(precision, str) or is_mapping, key, precision, works)


def _rollout(config: RolloutConfig) -> None:
    _at_least(
        1, "rollout.", config,
        "num_prompts_per_step", "num_samples_per_prompt", "max_response_tokens", "num_engines", "tensor_parallel_size",
    )  # fmt: skip
    _at_least(0, "rollout.", config, "max_staleness", "max_engine_restarts")
    _positive("rollout.", config, "temperature", "engine_timeout_s")
    _require(0 < config.top_p <= 1, "rollout.top_p", config.top_p, "a number in (0, 1]")
    _require(config.top_k == -1 or config.top_k >= 1, "rollout.top_k", config.top_k, "-1 (all tokens) or a number >= 1")
    dtypes, given = ("bfloat16", "float16", "float32"), config.engine_args.get("dtype")
    _require(config.dtype in ("auto", *dtypes), "rollout.dtype", config.dtype, f"auto or one of {', '.join(dtypes)}")
    _require(given is None or given in dtypes, "rollout.engine_args.dtype", given, f"rollout.dtype={config.dtype} alone")
    agree = given is None or config.dtype in ("auto", given)
    _require(agree, "rollout.engine_args.dtype", given, f"rollout.dtype={config.dtype} alone: the two disagree")
    for name, reason in UNKNOWN_TO_THE_LEARNER.items():
        if config.engine_args.get(name):
            raise ConfigError(f"rollout.engine_args.{name} cannot be trained with: {reason}; use those, or leave it out")
    for name in COUNTED_ARGS & config.engine_args.keys():
        value = config.engine_args[name]
        is_count = _is_number(value) and value >= 1 and value == int(value)
        _require(is_count, f"rollout.engine_args.{name}", value, "a whole number >= 1")
    share = config.engine_args.get("gpu_memory_utilization", 1)
    _require(_is_number(share) and 0 < share <= 1, "rollout.engine_args.gpu_memory_utilization", share, "a number in (0, 1]")
    _require(min(config.stop_token_ids, default=0) >= 0, "rollout.stop_token_ids", config.stop_token_ids, "token ids >= 0")


def _learner(config: LearnerConfig) -> None:
    _at_least(1, "learner.", config, "num_ranks", "num_mini_batches", "max_tokens_per_micro_batch")
    _at_least(0, "learner.", config, "weight_decay", "warmup_steps")
    _positive("learner.", config, "learning_rate", "scaled_layers_multiplier", "adam_epsilon", "max_grad_norm")
    _require(config.zero_stage in range(4), "learner.zero_stage", config.zero_stage, "0, 1, 2 or 3")
    betas = config.adam_betas
    _require(len(betas) == 2 and all(0 <= b < 1 for b in betas), "learner.adam_betas", betas, "two numbers in [0, 1)")


def _critic(config: TrainConfig) -> None:
    advantage, critic = config.algorithm.advantage, config.critic
    if not config.algorithm.uses_critic:
        works = f"its default, or algorithm.advantage.name={GAE} (algorithm=ppo): {advantage.name} has no critic"
        _unchanged("critic.", critic, CriticConfig(), works)
        _unchanged("algorithm.advantage.", advantage, AdvantageConfig(name=advantage.name), works)
        return
    for name in ("discount", "gae_lambda"):
        _require(0 <= getattr(advantage, name) <= 1, f"algorithm.advantage.{name}", getattr(advantage, name), "a number in [0, 1]")
    _positive("critic.", critic, "learning_rate")
    clip, warmup = critic.value_clip, critic.num_warmup_iterations
    _require(clip is None or (math.isfinite(clip) and clip > 0), "critic.value_clip", clip, "null or a number > 0, e.g. 0.5")
    _at_least(0, "critic.", critic, "num_warmup_iterations")
    _require(warmup < config.num_steps, "critic.num_warmup_iterations", warmup, f"less than num_steps={config.num_steps}")
    _require(critic.path != "", "critic.path", "''", "null (model.path), a local folder or a hub name")
    _require(critic.revision is None or bool(critic.path), "critic.revision", critic.revision, "null, or critic.path with it")


def _sync(config: SyncConfig) -> None:
    _require(config.transport in TRANSPORTS, "sync.transport", config.transport, f"one of {', '.join(TRANSPORTS)}")
    _at_least(1 << 10, "sync.", config, "bucket_bytes")
    _at_least(1, "sync.", config, "max_inflight_buckets")
    _at_least(0, "sync.", config, "max_retries", "audit_layers", "track_changes_interval")
    _positive("sync.", config, "timeout_s")
    _require(config.track_changes or not config.delta, "sync.delta", "true", "sync.track_changes=true with it, or sync.delta=false")


def _reward(config: RewardConfig) -> None:
    _require(bool(config.function), "reward.function", "''", "a name such as math, or package.module:attribute")
    _at_least(1, "reward.", config, "num_workers")
    _positive("reward.", config, "timeout_s")
    fraction = config.max_error_fraction
    _require(0 <= fraction <= 1, "reward.max_error_fraction", fraction, "a number in [0, 1]")


def _probe(config: ProbeConfig) -> None:
    _at_least(0, "probe.", config, "every_steps")
    _at_least(1, "probe.", config, "num_samples")
    limit = config.start_max_kl
    _require(limit is None or limit > 0, "probe.start_max_kl", limit, "null or a number > 0")


def _guard(config: GuardConfig, quantization: QuantizationConfig) -> None:
    for name, low in (("max_kl", 0), ("max_ratio", 1), ("max_repetition", 0)):
        value = getattr(config, name)
        works = f"null or a number > {low}"
        _require(value is None or (math.isfinite(value) and value > low), f"guard.{name}", value, works)
    _at_least(1, "guard.", config, "recovery_steps")
    fraction = config.recovery_fraction
    _require(0 < fraction <= 1, "guard.recovery_fraction", fraction, "a number in (0, 1]")
    is_idle = config.action is not GuardAction.warn and not config.has_limit
    _require(not is_idle, "guard.action", config.action.name, "guard.max_kl, max_ratio or max_repetition with it, or warn")
    action, format = config.action, quantization.format
    _require(format != "none" or not action.falls_back, "guard.action", action.name, "warn or stop with quantization=none")
    fits = action is not GuardAction.raise_precision or format == "axbxp"
    _require(fits, "guard.action", action.name, f"quantization=axbxp with it, or full_precision with quantization={format}")


def _evaluation(config: EvaluationConfig) -> None:
    _at_least(0, "evaluation.", config, "every_steps", "temperature")
    _at_least(1, "evaluation.", config, "num_samples_per_prompt")
    _require(0 < config.top_p <= 1, "evaluation.top_p", config.top_p, "a number in (0, 1]")
    greedy = config.temperature == 0 and config.num_samples_per_prompt > 1
    _require(
        not greedy,
        "evaluation.num_samples_per_prompt",
        config.num_samples_per_prompt,
        "1 with evaluation.temperature=0 (all samples are equal), or a temperature > 0",
    )
    limit = config.max_response_tokens
    _require(limit is None or limit >= 1, "evaluation.max_response_tokens", limit, "null or a number >= 1")


def _periphery(checkpoint: CheckpointConfig, cluster: ClusterConfig, logging: LoggingConfig) -> None:
    _at_least(0, "checkpoint.", checkpoint, "every_steps")
    _at_least(1, "checkpoint.", checkpoint, "keep_last")
    _at_least(0, "cluster.", cluster, "engine_threads", "learner_threads")
    _positive("cluster.", cluster, "stall_timeout_s")
    _at_least(0, "logging.", logging, "num_rollouts_per_step")


def _batch(config: TrainConfig) -> None:
    rollout, learner = config.rollout, config.learner
    prompts, mini_batches = rollout.num_prompts_per_step, learner.num_mini_batches
    if prompts % mini_batches:
        divisors = ", ".join(str(n) for n in range(1, prompts + 1) if prompts % n == 0)
        needs = f"a divisor of rollout.num_prompts_per_step={prompts}: {divisors}"
        _require(False, "learner.num_mini_batches", mini_batches, needs)
    samples = prompts // mini_batches * rollout.num_samples_per_prompt
    _require(
        learner.num_ranks <= samples,
        "learner.num_ranks",
        learner.num_ranks,
        f"at most {samples}, the samples of a mini-batch; or more rollout.num_prompts_per_step",
    )
    advantage = config.algorithm.advantage.name
    if advantage in RELATIVE_TO_THE_GROUP:
        _require(
            rollout.num_samples_per_prompt >= 2,
            "rollout.num_samples_per_prompt",
            rollout.num_samples_per_prompt,
            f"at least 2 with algorithm.advantage.name={advantage}: a group of one has no advantage",
        )
    _dynamic_batch(config.algorithm.dynamic_sampling, rollout)
    penalty_tokens = config.algorithm.overlong.penalty_tokens
    _require(
        penalty_tokens <= rollout.max_response_tokens,
        "algorithm.overlong.penalty_tokens",
        penalty_tokens,
        f"at most {rollout.max_response_tokens} = rollout.max_response_tokens",
    )
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    _require(
        learner.max_tokens_per_micro_batch >= longest,
        "learner.max_tokens_per_micro_batch",
        learner.max_tokens_per_micro_batch,
        f"at least {longest} = data.max_prompt_tokens + rollout.max_response_tokens",
    )


def _stages(config: TrainConfig) -> None:
    """Stages are in order, and each of them could be a run of its own."""
    before = 0
    for index, stage in enumerate(config.stages):
        key = f"stages[{index}]."
        after = f"a number > {before}: stages are listed in the order in which they begin, and rollout itself is what comes before"
        _require(stage.from_step > before, f"{key}from_step", stage.from_step, after)
        before = stage.from_step
        changes = [f.name for f in fields(stage) if f.name != "from_step" and getattr(stage, f.name) is not None]
        names = ", ".join(f.name for f in fields(stage) if f.name != "from_step")
        _require(bool(changes), f"{key[:-1]}", f"from_step {stage.from_step}", f"one of {names} in it, or leave it out")
        _at_least(1, key, stage, *changes)
        try:
            _batch(replace(config, rollout=config.rollout_of_stage(index + 1)))
        except ConfigError as error:
            raise ConfigError(f"stages[{index}] (from iteration {stage.from_step}): {error}") from error


def _dynamic_batch(config: DynamicSamplingConfig, rollout: RolloutConfig) -> None:
    if not config.enabled:
        return
    samples, prompts = rollout.num_samples_per_prompt, rollout.num_prompts_per_step
    _require(
        samples >= 2,
        "rollout.num_samples_per_prompt",
        samples,
        "at least 2 with algorithm.dynamic_sampling.enabled=true: the rewards of a group of one never differ",
    )
    at_a_time = config.num_prompts_per_generation or prompts
    _require(
        at_a_time * config.max_generations >= prompts,
        "algorithm.dynamic_sampling.max_generations",
        config.max_generations,
        f"at least {math.ceil(prompts / at_a_time)}, so that it can find rollout.num_prompts_per_step={prompts}",
    )


def check_devices(config: TrainConfig, device: Device) -> None:
    """Raises ConfigError for keys that `device` cannot serve: cluster.device, or what auto turned out to be."""
    transport, colocate = config.sync.transport, config.cluster.colocate
    _require(
        device in TRANSPORTS[transport],
        "sync.transport",
        transport,
        f"auto, object_store, shared_memory or gloo with cluster.device={device.name}",
    )
    _require(not (colocate and device is Device.cpu), "cluster.colocate", "true", "false with cluster.device=cpu")
    if colocate:
        engines, size = config.rollout.num_engines, config.rollout.tensor_parallel_size
        ranks = config.learner.num_ranks
        _require(size == 1, "rollout.tensor_parallel_size", size, "1 with cluster.colocate=true")
        _require(engines == ranks, "rollout.num_engines", engines, f"{ranks} = learner.num_ranks with cluster.colocate=true")
    _require(transport != "nccl" or not colocate, "sync.transport", "nccl", "auto or cuda_ipc with cluster.colocate=true")
    _require(transport != "cuda_ipc" or colocate, "sync.transport", "cuda_ipc", "auto or nccl with cluster.colocate=false")
    staleness = config.rollout.max_staleness
    _require(
        not (colocate and staleness),
        "rollout.max_staleness",
        staleness,
        "0 with cluster.colocate=true: engines and learner take turns on the GPUs",
    )
