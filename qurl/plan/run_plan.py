"""The whole plan, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qurl.config.learner import LearnerDtype
from qurl.config.placement import Placement, num_gpus_needed, place
from qurl.config.run import Device, TrainConfig
from qurl.config.transport import check_reach
from qurl.config.validate import check_devices
from qurl.errors import ConfigError
from qurl.hardware import Hardware, detect, engine_dtype
from qurl.kept_tokens import max_bytes_per_token
from qurl.plan.architecture import check_head_size
from qurl.plan.batch import BatchPlan, plan_batch
from qurl.plan.critic import read_critic_facts
from qurl.plan.memory import (
    DEFAULT_GPU_MEMORY_UTILIZATION,
    PROCESS_BYTES,
    EngineMemory,
    LearnerMemory,
    engine_memory,
    engine_weight_bytes,
    holds_decoded,
    learner_memory,
    wire_bytes,
)
from qurl.plan.model_facts import ModelFacts, read_model_facts
from qurl.plan.preflight import check_datasets, check_model, check_names, check_raised_precision
from qurl.quantization import FORMATS
from qurl.quantization.devices import lacks

GIB = 1 << 30


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
    engine_dtype: str  # rollout.dtype, resolved
    wire_bytes: int  # one full weight update, per engine
    bf16_bytes: int  # the same in bfloat16
    host_bytes: int  # at most, of all processes in the memory of a node; of all nodes where `is_known` is false
    is_known: bool  # the machine is the one it will run on
    learner_share: int | None  # bytes of a GPU that a rank may use; None on the CPU or where the machine is not known
    engine_share: int | None
    warnings: tuple[str, ...]  # it runs, but the user should know


def make_plan(config: TrainConfig, machine: Hardware | None = None) -> RunPlan:
    """Plan a validated configuration on `machine`, or on this one.

    Raises ValueError, with key and remedy, for names, files, shapes, devices or memory with which it cannot run. Memory and
    number of the devices of a remote cluster (cluster.address) are judged only where `machine` describes it."""
    check_names(config)
    check_datasets(config)
    is_known = machine is not None or config.cluster.address is None
    machine = machine or detect()
    num_gpus = len(machine.gpus) * machine.num_nodes
    placement = place(config, num_gpus if is_known else None, machine.num_cores, machine.hidden_gpus)
    check_devices(config, Device[placement.device])
    dtype = engine_dtype(config.rollout.asked_dtype, placement.device, machine)
    config = replace(config, rollout=replace(config.rollout, dtype=dtype))
    size = config.rollout.tensor_parallel_size
    if is_known and placement.device == "cuda" and size > len(machine.gpus):
        raise ConfigError(f"rollout.tensor_parallel_size={size}: an engine stays on a node, whose GPUs are {len(machine.gpus)}")
    check_reach(config, placement.device, machine.num_nodes if is_known else None)
    model = read_model_facts(config.model)
    check_head_size(model.head_dim, placement.device)
    targets = check_model(config, model)
    check_raised_precision(config, targets, placement.device)
    wire = wire_bytes(config, model, targets)
    learner = learner_memory(config, model, wire, targets, placement.device)
    if (critic := read_critic_facts(config, model)) is not None:
        learner = learner.with_critic(learner_memory(config, critic, 0, frozenset(), placement.device))
    held = engine_weight_bytes(config, model, targets, placement.device)
    batches = [plan_batch(config, stage) for stage in range(len(config.stages) + 1)]
    engines = [
        engine_memory(config, model, held, batch.longest_tokens, batch.num_samples_per_engine, placement.device)
        for batch in batches
    ]
    learner_share, engine_share = _gpu_shares(config, machine) if is_known and placement.device == "cuda" else (None, None)
    plan = RunPlan(
        batch=batches[0],
        model=model,
        num_quantized_modules=len(targets),
        learner=learner,
        engine=engines[0],
        stages=tuple(
            StagePlan(from_step=stage.from_step, batch=batch, engine=needs)
            for stage, batch, needs in zip(config.stages, batches[1:], engines[1:], strict=True)
        ),
        placement=placement,
        machine=machine,
        engine_dtype=dtype,
        wire_bytes=wire,
        bf16_bytes=2 * model.num_parameters,
        host_bytes=_host_bytes(config, learner, engines[0], placement, machine if is_known else None),
        is_known=is_known,
        learner_share=learner_share,
        engine_share=engine_share,
        warnings=tuple(_warnings(config, engines, model.vocab_size, placement, machine, is_known)),
    )
    if is_known:
        _refuse_memory(plan)
    return plan


def _gpu_shares(config: TrainConfig, machine: Hardware) -> tuple[int, int]:
    """Bytes of a GPU for (a learner rank, an engine)."""
    memory = min(gpu.memory_bytes for gpu in machine.gpus)
    utilization = float(config.rollout.engine_args.get("gpu_memory_utilization", DEFAULT_GPU_MEMORY_UTILIZATION))
    engine = int(utilization * memory)
    return memory - (engine if config.cluster.colocate else 0), engine


def _host_bytes(
    config: TrainConfig, learner: LearnerMemory, engine: EngineMemory, placement: Placement, machine: Hardware | None
) -> int:
    """Memory of a node that holds as many ranks as it can, with the reward processes; on GPUs only what stays on the host."""
    engines, ranks = config.rollout.num_engines, config.learner.num_ranks
    if machine is not None and placement.device == "cuda":
        ranks = min(ranks, len(machine.gpus))
        left = len(machine.gpus) - (0 if config.cluster.colocate else ranks)
        engines = min(engines, left // config.rollout.tensor_parallel_size)
    total = (engines + ranks + config.reward.num_workers) * PROCESS_BYTES
    total += config.sync.max_inflight_buckets * config.sync.bucket_bytes * ranks
    if placement.device == "cuda":
        return total + ranks * learner.on_host
    total += ranks * (learner.while_training + learner.offloaded + learner.previous_codes + learner.previous_weights)
    return total + engines * (engine.weights + (engine.kv_pool or 0))


def _refuse_memory(plan: RunPlan) -> None:
    memory = plan.machine.memory_bytes
    if plan.host_bytes > memory:
        whose = "this machine's" if plan.machine.num_nodes == 1 else "a node's"
        raise ConfigError(
            f"the run needs about {_gib(plan.host_bytes)} of {whose} {_gib(memory)} memory; lower "
            "learner.max_tokens_per_micro_batch, rollout.num_engines or rollout.engine_args.kv_cache_memory_bytes, "
            "set sync.delta=false, sync.track_changes=false and sync.track_updates=false, offload less, or take a smaller model"
        )
    for batch, engine in [(plan.batch, plan.engine), *((stage.batch, stage.engine) for stage in plan.stages)]:
        if engine.kv_pool is not None and engine.kv_per_sequence > engine.kv_pool:
            raise ConfigError(
                f"rollout.engine_args.kv_cache_memory_bytes={engine.kv_pool} does not hold one sequence of "
                f"{batch.longest_tokens} tokens; use at least {engine.kv_per_sequence}"
            )
    if plan.learner_share is not None and plan.engine_share is not None:
        _refuse_gpu_memory(plan, plan.learner_share, plan.engine_share)


def _refuse_gpu_memory(plan: RunPlan, learner_share: int, engine_share: int) -> None:
    one_sequence = max(engine.kv_per_sequence for engine in (plan.engine, *(stage.engine for stage in plan.stages)))
    engine_needs = plan.engine.weights + plan.engine.workspace + one_sequence
    if engine_needs > engine_share:
        raise ConfigError(
            f"an engine needs at least {_gib(engine_needs)} for weights, a step and one sequence, its GPU gives "
            f"{_gib(engine_share)}; raise rollout.tensor_parallel_size or rollout.engine_args.gpu_memory_utilization, or lower "
            "rollout.max_response_tokens"
        )
    if plan.learner.on_device > learner_share:
        starting = plan.learner.while_starting > plan.learner.while_training
        when = " while it starts, before ZeRO 3 has sharded the model" if starting else ""
        raise ConfigError(
            f"a learner rank needs about {_gib(plan.learner.on_device)}{when}, its GPU has {_gib(learner_share)} for it; raise "
            "learner.zero_stage or learner.num_ranks, set learner.activation_checkpointing=true or "
            "learner.deepspeed.zero_optimization.offload_optimizer.device=cpu, lower learner.max_tokens_per_micro_batch or, with "
            "cluster.colocate, rollout.engine_args.gpu_memory_utilization"
        )


def _warnings(
    config: TrainConfig,
    memory: list[EngineMemory],
    vocab_size: int,
    placement: Placement,
    machine: Hardware,
    is_known: bool,
) -> list[str]:
    """memory: of an engine, stage by stage."""
    found = []
    late = [index for index, stage in enumerate(config.stages) if stage.from_step >= config.num_steps]
    if late:
        begins = config.stages[late[0]].from_step
        found.append(f"stages[{late[0]}] begins with iteration {begins} and the run ends before, at num_steps={config.num_steps}")
    engine = max(memory, key=lambda needs: needs.kv_all)
    engines, ranks = config.rollout.num_engines, config.learner.num_ranks
    is_fp8 = config.quantization.format.startswith("fp8")
    if config.rollout.cuts:
        rollout, most = config.rollout, max_bytes_per_token(config.rollout.top_k, vocab_size)
        tokens = rollout.num_prompts_per_step * rollout.num_samples_per_prompt * rollout.max_response_tokens
        found.append(
            f"each token travels with the set that rollout.top_p={rollout.top_p:g} and rollout.top_k={rollout.top_k} left to draw "
            f"from: 4 bytes a member, at most {most:,} bytes a token and {tokens * most / 2**20:,.1f} MiB an iteration; a smaller "
            "rollout.top_k bounds it"
        )
    if placement.device == "cpu":
        threads = {"engines": engines * placement.engine_threads, "learner": ranks * placement.learner_threads}
        at_once = sum(threads.values()) if config.rollout.max_staleness > 0 else max(threads.values())
        if at_once > machine.num_cores:
            found.append(
                f"{at_once} threads compete for {machine.num_cores} cores and will slow each other down; lower "
                "rollout.num_engines, learner.num_ranks or cluster.*_threads"
            )
        if not machine.bfloat16_instructions and machine.cpu_flags:
            asked = {
                "rollout.dtype=float32": config.rollout.dtype == "bfloat16",
                "learner.dtype=float32": config.learner.dtype is LearnerDtype.bfloat16,
            }
            for key in (key for key, is_emulated in asked.items() if is_emulated):
                found.append(f"bfloat16 is emulated on this processor, which has no instructions for it; {key} is faster")
        if is_fp8:
            found.append("FP8 is emulated on the CPU: the numbers are exact, the speed is not that of FP8")
    for gpu in machine.gpus if placement.device == "cuda" else ():
        if lacking := lacks(FORMATS[config.quantization.format], gpu.capability):
            has = ".".join(map(str, gpu.capability))
            raise ConfigError(f"quantization={config.quantization.format} {lacking} ({gpu.name} has {has})")
    if holds_decoded(config):
        name = config.quantization.format
        found.append(f"{name} is emulated: the numbers are exact, the speed and the engine's memory are those of float32")
    if engine.kv_pool is not None and engine.kv_all > engine.kv_pool:
        found.append(
            f"the cache holds {engine.kv_pool // engine.kv_per_sequence} of {engine.num_sequences} full-length sequences of an "
            "engine; the rest waits. rollout.engine_args.kv_cache_memory_bytes raises it"
        )
    if not is_known:
        gpus = f"must have {num_gpus_needed(config)} GPUs free; its" if placement.device == "cuda" else "is not looked at: its"
        found.append(f"the cluster {gpus} memory is not judged here")
    return found


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
