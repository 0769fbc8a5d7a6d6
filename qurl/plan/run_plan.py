"""The whole plan, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass

from qurl.config.placement import Placement, num_gpus_needed, place
from qurl.config.run import Device, TrainConfig
from qurl.config.validate import check_devices
from qurl.errors import ConfigError
from qurl.hardware import Hardware, detect
from qurl.plan.batch import BatchPlan, plan_batch
from qurl.plan.critic import read_critic_facts
from qurl.plan.memory import (
    DEFAULT_GPU_MEMORY_UTILIZATION,
    PROCESS_BYTES,
    EngineMemory,
    LearnerMemory,
    engine_memory,
    engine_weight_bytes,
    learner_memory,
    wire_bytes,
)
from qurl.plan.model_facts import ModelFacts, read_model_facts
from qurl.plan.preflight import check_datasets, check_model, check_names
from qurl.quantization import FORMATS
from qurl.quantization.grouped import GroupedFormat

GIB = 1 << 30
FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """What changes with an entry of `stages`."""

    from_step: int
    batch: BatchPlan
    engine: EngineMemory


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What a configuration comes to on given hardware."""

    batch: BatchPlan  # before the first of `stages`, as `engine`
    model: ModelFacts
    num_quantized_modules: int
    learner: LearnerMemory
    engine: EngineMemory
    stages: tuple[StagePlan, ...]
    placement: Placement
    machine: Hardware
    wire_bytes: int  # one full weight update, per engine
    bf16_bytes: int  # the same in bfloat16
    host_bytes: int  # of all processes in this machine's memory
    warnings: tuple[str, ...]  # it runs, but the user should know


def make_plan(config: TrainConfig, machine: Hardware | None = None) -> RunPlan:
    """Plan a validated configuration on `machine` (default: this one).

    Raises ValueError, with key and remedy, for names, files, shapes, devices or memory with which it cannot run. Memory and
    number of the devices of a remote cluster (cluster.address) are not known here and not judged."""
    check_names(config)
    check_datasets(config)
    machine = machine or detect()
    placement = place(config, num_gpus=len(machine.gpus), num_cores=machine.num_cores)
    check_devices(config, Device[placement.device])
    model = read_model_facts(config.model)
    targets = check_model(config, model)
    wire = wire_bytes(config, model, targets)
    learner = learner_memory(config, model, wire, targets)
    if (critic := read_critic_facts(config, model)) is not None:
        learner = learner.with_critic(learner_memory(config, critic, 0, frozenset()))
    held = engine_weight_bytes(config, model, targets, machine, placement.device)
    batches = [plan_batch(config, stage) for stage in range(len(config.stages) + 1)]
    engines = [
        engine_memory(config, model, held, batch.longest_tokens, batch.num_samples_per_engine, placement.device)
        for batch in batches
    ]
    engine = engines[0]
    plan = RunPlan(
        batch=batches[0],
        model=model,
        num_quantized_modules=len(targets),
        learner=learner,
        engine=engine,
        stages=tuple(
            StagePlan(from_step=stage.from_step, batch=batch, engine=needs)
            for stage, batch, needs in zip(config.stages, batches[1:], engines[1:], strict=True)
        ),
        placement=placement,
        machine=machine,
        wire_bytes=wire,
        bf16_bytes=2 * model.num_parameters,
        host_bytes=_host_bytes(config, learner, engine, placement),
        warnings=tuple(_warnings(config, engines, placement, machine)),
    )
    if config.cluster.address is None:
        _refuse_memory(config, plan)
    return plan


def _host_bytes(config: TrainConfig, learner: LearnerMemory, engine: EngineMemory, placement: Placement) -> int:
    """Memory of this machine over all processes; on GPUs only what stays on the host."""
    engines, ranks = config.rollout.num_engines, config.learner.num_ranks
    total = (engines + ranks + config.reward.num_workers) * PROCESS_BYTES
    total += ranks * (learner.previous_codes + learner.previous_weights)
    total += config.sync.max_inflight_buckets * config.sync.bucket_bytes * ranks
    if placement.device == "cpu":
        total += ranks * learner.on_device + engines * (engine.weights + (engine.kv_pool or 0))
    return total


def _refuse_memory(config: TrainConfig, plan: RunPlan) -> None:
    memory = plan.machine.memory_bytes
    if plan.host_bytes > memory:
        raise ConfigError(
            f"the run needs about {_gib(plan.host_bytes)} of this machine's {_gib(memory)} memory; lower "
            "learner.max_tokens_per_micro_batch, rollout.num_engines or rollout.engine_args.kv_cache_memory_bytes, "
            "set sync.track_changes=false and sync.track_updates=false, or take a smaller model"
        )
    for batch, engine in [(plan.batch, plan.engine), *((stage.batch, stage.engine) for stage in plan.stages)]:
        if engine.kv_pool is not None and engine.kv_per_sequence > engine.kv_pool:
            raise ConfigError(
                f"rollout.engine_args.kv_cache_memory_bytes={engine.kv_pool} does not hold one sequence of "
                f"{batch.longest_tokens} tokens; use at least {engine.kv_per_sequence}"
            )
    if plan.placement.device == "cuda":
        _refuse_gpu_memory(config, plan)


def _refuse_gpu_memory(config: TrainConfig, plan: RunPlan) -> None:
    memory = min(gpu.memory_bytes for gpu in plan.machine.gpus)
    utilization = float(config.rollout.engine_args.get("gpu_memory_utilization", DEFAULT_GPU_MEMORY_UTILIZATION))
    one_sequence = max(engine.kv_per_sequence for engine in (plan.engine, *(stage.engine for stage in plan.stages)))
    engine_needs, engine_has = plan.engine.weights + one_sequence, int(utilization * memory)
    if engine_needs > engine_has:
        raise ConfigError(
            f"an engine needs at least {_gib(engine_needs)} for weights and one sequence, its GPU gives {_gib(engine_has)}; "
            "raise rollout.tensor_parallel_size, or lower rollout.max_response_tokens"
        )
    learner_has = memory - (engine_has if config.cluster.colocate else 0)
    if plan.learner.on_device > learner_has:
        raise ConfigError(
            f"a learner rank needs about {_gib(plan.learner.on_device)}, its GPU has {_gib(learner_has)} for it; raise "
            "learner.zero_stage or learner.num_ranks, set learner.activation_checkpointing=true, lower "
            "learner.max_tokens_per_micro_batch"
            + (" or rollout.engine_args.gpu_memory_utilization" if config.cluster.colocate else "")
        )


def _warnings(config: TrainConfig, memory: list[EngineMemory], placement: Placement, machine: Hardware) -> list[str]:
    """memory: of an engine, stage by stage."""
    found = []
    late = [index for index, stage in enumerate(config.stages) if stage.from_step >= config.num_steps]
    if late:
        begins = config.stages[late[0]].from_step
        found.append(f"stages[{late[0]}] begins with iteration {begins} and the run ends before, at num_steps={config.num_steps}")
    engine = max(memory, key=lambda needs: needs.kv_all)
    engines, ranks = config.rollout.num_engines, config.learner.num_ranks
    is_fp8 = config.quantization.format.startswith("fp8")
    if config.rollout.top_p < 1 or config.rollout.top_k > 0:
        found.append(
            f"rollout.top_p={config.rollout.top_p:g} and rollout.top_k={config.rollout.top_k} cut the distribution that is sampled "
            "from; the learner's is whole, so mismatch/* and the correction contain the cut (ratios below 1) besides quantization"
        )
    if placement.device == "cpu":
        threads = {"engines": engines * placement.engine_threads, "learner": ranks * placement.learner_threads}
        at_once = sum(threads.values()) if config.rollout.max_staleness > 0 else max(threads.values())
        if at_once > machine.num_cores:
            found.append(
                f"{at_once} threads compete for {machine.num_cores} cores and will slow each other down; lower "
                "rollout.num_engines, learner.num_ranks or cluster.*_threads"
            )
        if is_fp8:
            found.append("FP8 is emulated on the CPU: the numbers are exact, the speed is not that of FP8")
    elif is_fp8 and machine.gpus and min(gpu.capability for gpu in machine.gpus) < FP8_CAPABILITY:
        raise ConfigError(
            f"quantization={config.quantization.format} needs compute capability 8.9, {machine.gpus[0].name} has "
            f"{'.'.join(map(str, machine.gpus[0].capability))}; use quantization=int8"
        )
    if isinstance(FORMATS[config.quantization.format], GroupedFormat):
        name = config.quantization.format
        found.append(f"{name} is emulated: the numbers are exact, the speed and the engine's memory are those of float32")
    if engine.kv_pool is not None and engine.kv_all > engine.kv_pool:
        found.append(
            f"the cache holds {engine.kv_pool // engine.kv_per_sequence} of {engine.num_sequences} full-length sequences of an "
            "engine; the rest waits. rollout.engine_args.kv_cache_memory_bytes raises it"
        )
    if config.cluster.address is not None:
        found.append(f"the cluster must have {num_gpus_needed(config)} GPUs free; its memory is not judged here")
    return found


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
