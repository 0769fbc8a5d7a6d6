"""The plan as rich tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from qurl.config.run import TrainConfig
from qurl.hardware import UNLIMITED
from qurl.plan import BatchPlan, EngineMemory, RunPlan

GIB = 1 << 30


def plan_tables(config: TrainConfig, plan: RunPlan) -> Iterator[Table]:
    """One table per subject."""
    yield _table("Iteration", _batch_rows(config, plan.batch, 0))
    for index, stage in enumerate(plan.stages, start=1):
        yield _table(f"From iteration {stage.from_step} on", _batch_rows(config, stage.batch, index))
    yield _table("Model and weight stream", _model_rows(config, plan))
    yield _table("Placement", _placement_rows(config, plan))
    yield memory_table(plan)
    yield _table(f"Memory of a learner rank (ZeRO {config.learner.zero_stage})", _learner_rows(plan))
    yield _table("Memory of an engine", _engine_rows(plan.engine))
    for stage in plan.stages:
        yield _table(f"Memory of an engine from iteration {stage.from_step} on", _engine_rows(stage.engine))


def memory_table(plan: RunPlan) -> Table:
    """What is needed of what there is, in three lines."""
    return _table("Memory", _memory_rows(plan))


def _table(title: str, rows: Iterator[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table


def _batch_rows(config: TrainConfig, batch: BatchPlan, stage: int) -> Iterator[tuple[str, str]]:
    learner = config.learner
    group = config.rollout_of_stage(stage).num_samples_per_prompt
    yield "samples", f"{batch.num_prompts} prompts x {group} = {batch.num_samples:,}, {batch.num_samples_per_engine:,} per engine"
    yield "tokens", f"at most {batch.max_tokens:,} ({batch.longest_tokens:,} per sample)"
    yield "mini-batches", f"{batch.num_mini_batches} of {batch.num_samples_per_mini_batch:,} samples, an optimizer step each"
    yield (
        "micro-batches",
        f"at most {batch.max_micro_batches} of {learner.max_tokens_per_micro_batch:,} tokens, per rank and mini-batch",
    )
    if stage == 0:
        yield "run", f"{config.num_steps:,} iterations, {batch.num_optimizer_steps:,} optimizer steps"


def _model_rows(config: TrainConfig, plan: RunPlan) -> Iterator[tuple[str, str]]:
    model = plan.model
    shape = f"{model.num_layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size:,}"
    yield config.model.path, f"{model.num_parameters:,} parameters; {shape}"
    yield "quantized", f"{plan.num_quantized_modules} of {len(model.linear_names)} linear layers to {config.quantization.format}"
    yield "the rest", f"{plan.engine_dtype} in the engines, {config.learner.dtype.name} in the learner"
    ratio = plan.bf16_bytes / plan.wire_bytes
    yield "weight update", f"{_size(plan.wire_bytes)} per engine, {ratio:.2f} times fewer than bfloat16 ({_size(plan.bf16_bytes)})"


def _placement_rows(config: TrainConfig, plan: RunPlan) -> Iterator[tuple[str, str]]:
    place, machine = plan.placement, plan.machine
    engines, ranks = config.rollout.num_engines, config.learner.num_ranks
    if place.device == "cpu":
        turns = "in turns" if config.rollout.max_staleness == 0 else "at the same time"
        yield "machine", f"{machine.cpu_name}, {machine.num_cores} cores, {_size(machine.memory_bytes)}"
        yield "engines", f"{engines} x {place.engine_threads} threads, with the learner {turns}"
        yield "learner ranks", f"{ranks} x {place.learner_threads} threads"
    else:
        size = config.rollout.tensor_parallel_size
        name = machine.gpus[0].name if machine.gpus else "a remote cluster"
        nodes = f"{machine.num_nodes} nodes of " if machine.num_nodes > 1 else ""
        yield "machine", f"{nodes}{len(machine.gpus) or '?'} x {name}"
        if config.cluster.colocate:
            yield "GPU i", f"engine i and learner rank i, i = 0..{ranks - 1}"
        else:
            yield "learner ranks", f"{ranks} GPUs, one each"
            yield "engines", f"{engines * size} GPUs: {engines} x {size}"


def _memory_rows(plan: RunPlan) -> Iterator[tuple[str, str]]:
    yield "learner rank", f"about {_size(plan.learner.on_device)}{_of(plan.learner_share)}"
    stages = [plan.engine, *(stage.engine for stage in plan.stages)]
    cache = plan.engine.kv_pool if plan.engine_share is None else plan.engine_share - plan.engine.weights - plan.engine.workspace
    told = f"{_size(plan.engine.weights)} of weights"
    if cache is not None:
        held = " / ".join(str(cache // engine.kv_per_sequence) for engine in stages)
        told += f", cache for {held} full-length samples in {_size(cache)}"
    yield "engine", told
    where = "" if plan.machine.num_nodes == 1 else " on a node" if plan.is_known else " over all nodes"
    memory = plan.machine.memory_bytes if plan.is_known else UNLIMITED
    yield "host", f"about {_size(plan.host_bytes)}{_of(None if memory == UNLIMITED else memory)}{where}"


def _of(size: int | None) -> str:
    return "" if size is None else f" of {_size(size)}"


def _learner_rows(plan: RunPlan) -> Iterator[tuple[str, str]]:
    memory = plan.learner
    yield "weights", _size(memory.weights)
    if memory.gathered:
        yield "of other ranks", f"at most {_size(memory.gathered)} at a time"
    yield "gradients", _size(memory.gradients)
    yield "optimizer", f"{_size(memory.optimizer)} (float32 master weights and moments)"
    if memory.communication:
        yield "reduce bucket", _size(memory.communication)
    if memory.reference:
        yield "reference policy", _size(memory.reference)
    if memory.critic:
        yield "critic", f"{_size(memory.critic)} (its weights, gradients, optimizer and reduce bucket)"
    if memory.kept_codes:
        yield "previous codes", f"{_size(memory.kept_codes)} (sync.track_changes)"
    yield "activations", f"{_size(memory.activations)} (estimate)"
    if memory.mask:
        yield "attention mask", f"{_size(memory.mask)} (dense, of a packed row)"
    yield "logits", f"{_size(memory.logits)} (a chunk)"
    if memory.runtime:
        yield "CUDA, NCCL", f"{_size(memory.runtime)} (contexts of this GPU's processes, buffers)"
    yield "total", f"{_size(memory.while_training)} on the device"
    if memory.while_starting > memory.while_training:
        yield "while it starts", f"{_size(memory.while_starting)} on the device, before the model is sharded"
    if memory.offloaded:
        yield "offloaded", f"{_size(memory.offloaded)} in host memory"
    if memory.previous_codes:
        yield "previous update", f"{_size(memory.previous_codes)} in host memory (sync.delta)"
    if memory.previous_weights:
        yield "previous weights", f"{_size(memory.previous_weights)} in host memory"


def _engine_rows(memory: EngineMemory) -> Iterator[tuple[str, str]]:
    yield "weights", _size(memory.weights)
    if memory.workspace:
        yield "a step", f"{_size(memory.workspace)} (activations, logits, CUDA graphs; an estimate)"
    yield "cache", f"{_size(memory.kv_per_sequence)} per full-length sequence, {_size(memory.kv_all)} for {memory.num_sequences}"
    if memory.kv_pool is not None:
        yield "cache reserved", _size(memory.kv_pool)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes / 2**20:.2f} MiB"
