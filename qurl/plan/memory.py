"""Memory of a learner rank and of an engine, in bytes.

Weights, optimizer state and key-value cache are exact up to padding. Activations are an estimate that counts what backward keeps
of a decoder layer with gated feed-forward and dense attention masks, and what the backward of one layer makes beside it. On GPUs
CUDA contexts, NCCL and what vLLM computes with are counted by their usual sizes. Allocator fragmentation comes on top."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from qurl.config.guard import GuardAction, GuardConfig
from qurl.config.learner import LearnerDtype
from qurl.config.run import TrainConfig
from qurl.learner.deepspeed_config import deepspeed_config, offload_device
from qurl.learner.scored_head import LOGIT_BYTES
from qurl.plan.model_facts import ModelFacts
from qurl.quantization import QuantizationFormat, resolved_format
from qurl.quantization.axbxp import AxBxP, PackedAxBxP
from qurl.quantization.grouped import GroupedFormat
from qurl.quantization.lobcq import LoBcq
from qurl.rollout.vllm_engine import CPU_KV_CACHE_BYTES
from qurl.sync.code_changes import interval_on

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
"""auto: where it was not resolved for a machine, bfloat16."""
MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of zero_optimization.stage3_max_live_parameters."""
DEFAULT_GPU_MEMORY_UTILIZATION = 0.92
"""vLLM's."""
CUDA_CONTEXT_BYTES = 512 << 20
"""What a process takes of a GPU before it holds a tensor: context, code of the kernels, cuBLAS."""
NCCL_BYTES = 1 << 30
"""Buffers of the communicators of a rank, or of a part of an engine that is divided over GPUs; 1 to 2 GiB on eight GPUs."""
CUDA_GRAPH_BYTES = 1 << 30
"""An engine's captured graphs."""
PROCESS_BYTES = 800 << 20
"""Python, torch and vLLM or DeepSpeed in one process, measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerMemory:
    """Of one rank, on its device; what is offloaded or previous is in host memory."""

    weights: int
    gathered: int  # ZeRO-3: weights of other ranks while they are used, at most
    gradients: int
    optimizer: int  # float32 master weights where there are any, and Adam's two moments
    communication: int  # DeepSpeed's reduce bucket
    reference: int  # the frozen policy of a KL term
    critic: int  # its weights, gradients, optimizer and reduce bucket
    activations: int
    mask: int  # of attention among packed rows, and the bias that it becomes
    logits: int
    runtime: int  # CUDA contexts of the GPU's processes and NCCL; 0 on the CPU
    offloaded: int  # optimizer state, gradients and weights that DeepSpeed keeps on the host
    kept_codes: int  # that the next update is compared with; on the device
    previous_codes: int  # all wire tensors, for sync.delta
    previous_weights: int  # float32 copies that updates are measured against
    whole_model: int  # in the dtype of forward and backward; on the device until ZeRO-3 has sharded it, one after the other
    as_read: int  # the model in float32, on the host until the master weights are made of it

    @property
    def while_training(self) -> int:
        """On the device."""
        states = self.state + self.gathered + self.reference + self.critic + self.kept_codes
        return states + self.activations + self.mask + self.logits + self.runtime

    @property
    def while_starting(self) -> int:
        """On the device."""
        return self.whole_model + self.runtime + (self.state if self.reference or self.critic else 0)

    @property
    def on_device(self) -> int:
        """The most at any time."""
        return max(self.while_training, self.while_starting)

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer + self.communication

    @property
    def on_host(self) -> int:
        """The most at any time, of a rank that trains on a GPU."""
        return self.offloaded + max(self.as_read, self.previous_codes + self.previous_weights)

    def with_critic(self, critic: LearnerMemory) -> LearnerMemory:
        """This policy and a critic on the same rank; they run one after the other."""
        return replace(
            self,
            critic=critic.state,
            activations=max(self.activations, critic.activations),
            mask=max(self.mask, critic.mask),
            gathered=max(self.gathered, critic.gathered),
            offloaded=self.offloaded + critic.offloaded,
            whole_model=max(self.whole_model, critic.whole_model),
            as_read=max(self.as_read, critic.as_read),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineMemory:
    """Of one GPU of an engine, or of the engine on a CPU."""

    weights: int
    workspace: int  # activations of a step, logits, CUDA graphs, NCCL; 0 on the CPU
    kv_per_sequence: int  # prompt and response at full length
    num_sequences: int  # computed at the same time
    kv_pool: int | None  # what vLLM reserves on a CPU; None on a GPU, where it takes what is left

    @property
    def kv_all(self) -> int:
        """Cache that all concurrent sequences need at full length."""
        return self.kv_per_sequence * self.num_sequences


def _quantization(config: TrainConfig) -> QuantizationFormat:
    """The format, as far as sizes depend on it."""
    given = config.quantization
    return resolved_format(given.format, codebooks=given.codebooks, group_size=given.group_size)


def wire_bytes(config: TrainConfig, model: ModelFacts, targets: frozenset[str]) -> int:
    """Bytes of one full weight update."""
    plain = DTYPE_BYTES[config.rollout.asked_dtype]
    bits_per_weight = _quantization(config).bits_per_weight
    total = 0.0
    for name, shape in model.parameters.items():
        quantized = name.removesuffix(".weight") in targets
        total += math.prod(shape) * (bits_per_weight(shape) / 8 if quantized else plain)
    return math.ceil(total)


def engine_weight_bytes(config: TrainConfig, model: ModelFacts, targets: frozenset[str], device: str) -> int:
    """What an engine keeps of the weights: the bytes of the wire, or four a weight where holds_decoded. Not counted is up to half a
    bit a weight that selectors of LO-BCQ with fewer than 16 books take more on a CPU. On a GPU packed Ax-BxP is expanded to INT8.
    Ax-BxP that is not packed is multiplied as INT8, beside the codes of the wire. The larger of the two where guard may have the
    engine hold them without quantization."""
    if config.guard.action is GuardAction.full_precision and targets:
        ordinary = replace(config, guard=GuardConfig())
        quantized = engine_weight_bytes(ordinary, model, targets, device)
        return max(quantized, wire_bytes(config, model, frozenset()))
    on_wire = wire_bytes(config, model, targets)
    quantization = _quantization(config)
    shapes = [shape for name, shape in model.parameters.items() if name.removesuffix(".weight") in targets]
    if isinstance(quantization, PackedAxBxP) and device != "cpu":
        return wire_bytes(replace(config, quantization=replace(config.quantization, format="int8", precision=None)), model, targets)
    if isinstance(quantization, AxBxP) and not isinstance(quantization, PackedAxBxP):
        return on_wire + sum(map(math.prod, shapes))
    if not holds_decoded(config):
        return on_wire
    return on_wire + math.ceil(sum(math.prod(shape) * (32.0 - quantization.bits_per_weight(shape)) / 8 for shape in shapes))


def holds_decoded(config: TrainConfig) -> bool:
    """Whether the engine multiplies decoded float32 weights: formats of 4 bits that no kernel is written for. Not foreseen: LO-BCQ
    on a CPU without a compiler, where qurl doctor fails."""
    quantization = _quantization(config)
    return isinstance(quantization, GroupedFormat) and not isinstance(quantization, LoBcq)


def learner_memory(
    config: TrainConfig, model: ModelFacts, update_bytes: int, targets: frozenset[str], device: str
) -> LearnerMemory:
    """One rank under learner.zero_stage (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1).

    bfloat16 keeps gradients and master weights in float32; stage 0 then runs as stage 1. An offloaded optimizer has gradients on
    the host twice, as they are accumulated and in float32 for the step, and the weights that go back to the device under stages
    1 and 2; stage 1 sums its gradients on the device. update_bytes: of one weight update.
    targets: the modules that are quantized. device: that the rank trains on."""
    learner = config.learner
    size, ranks = model.num_parameters, learner.num_ranks
    zero = deepspeed_config(learner, size)["zero_optimization"]
    stage = int(zero["stage"])
    compute = 2 if learner.dtype is LearnerDtype.bfloat16 else 4
    weights = size * compute // (ranks if stage == 3 else 1)
    gradients = size * 4 // (ranks if stage >= 2 else 1)
    optimizer = size * (12 if stage >= 1 else 8) // (ranks if stage >= 1 else 1)
    offloaded = 0
    if (place := offload_device(zero, "offload_optimizer")) != "none":
        twice = 8 if stage == 3 else 4 + 2 * compute
        offloaded += optimizer + size * twice // ranks if place == "cpu" else 0
        gradients, optimizer = gradients if stage == 1 else 0, 0
    if (place := offload_device(zero, "offload_param")) != "none":
        offloaded += weights if place == "cpu" else 0
        weights = 0
    tokens = learner.max_tokens_per_micro_batch
    quantized = sum(math.prod(shape) for name, shape in model.parameters.items() if name.removesuffix(".weight") in targets)
    live = int(zero.get("stage3_max_live_parameters", MAX_LIVE_PARAMETERS))
    return LearnerMemory(
        weights=weights,
        gathered=min(size, live) * compute if stage == 3 else 0,
        gradients=gradients,
        optimizer=optimizer,
        communication=int(zero["reduce_bucket_size"]) * compute if stage >= 1 else 0,
        reference=size * compute // (ranks if stage == 3 else 1) if config.algorithm.kl.coefficient > 0 else 0,
        critic=0,
        activations=tokens * _activation_bytes_per_token(model, learner.activation_checkpointing, compute),
        mask=_mask_bytes(config, compute),
        logits=(5 if config.algorithm.entropy_coefficient else 3) * min(tokens * model.vocab_size * 4, LOGIT_BYTES),
        runtime=_runtime_bytes(config) if device == "cuda" else 0,
        offloaded=offloaded,
        kept_codes=_kept_codes(config, model, targets, device),
        previous_codes=update_bytes // ranks if config.sync.delta else 0,
        previous_weights=4 * quantized // ranks if config.sync.track_updates else 0,
        whole_model=size * compute,
        as_read=size * 4,
    )


def _kept_codes(config: TrainConfig, model: ModelFacts, targets: frozenset[str], device: str) -> int:
    """What sync.track_changes keeps on a rank: the codes of one matrix in so many, of the rank's share."""
    if not config.sync.track_changes:
        return 0
    codes = _quantization(config).bits_per_weight
    shapes = [shape for name, shape in model.parameters.items() if name.removesuffix(".weight") in targets]
    total = sum(math.prod(shape) * codes(shape) / 8 for shape in shapes)
    return math.ceil(total / config.learner.num_ranks / interval_on(device, config.sync.track_changes_interval))


def _activation_bytes_per_token(model: ModelFacts, checkpointing: bool, compute: int) -> int:
    """Bytes kept for backward: two norms with input and output, q, k, v and their rotated copies, the attention's output and four
    tensors of the feed-forward part; with checkpointing one input per layer, and one layer in full. Norms compute in float32, of
    which three more tensors a layer are left where that is not the dtype. Backward of a layer adds three tensors of the
    feed-forward part, and keys and values repeated for all heads."""
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    layer = 5 * model.hidden_size + 2 * heads + model.num_heads * model.head_dim + 4 * model.intermediate_size
    layer_bytes = layer * compute + (3 * model.hidden_size * 4 if compute < 4 else 0)
    backward = 3 * model.intermediate_size + 2 * (model.num_heads - model.num_kv_heads) * model.head_dim
    kept = model.num_layers * model.hidden_size * compute + layer_bytes if checkpointing else model.num_layers * layer_bytes
    return kept + backward * compute


def _mask_bytes(config: TrainConfig, compute: int) -> int:
    """Packed rows, as long as the longest sample, need a mask [rows, length, length] of bytes, which attention turns into numbers;
    varlen kernels ("flash") need none."""
    tokens = config.learner.max_tokens_per_micro_batch
    needs_none = "flash" in config.model.attn_implementation
    return 0 if needs_none else tokens * min(tokens, config.longest_tokens) * (1 + compute)


def _runtime_bytes(config: TrainConfig) -> int:
    """Of one learner rank's GPU, beside tensors; the engine that shares it has a context too, outside of its own share."""
    contexts = 2 if config.cluster.colocate else 1
    is_linked = config.learner.num_ranks > 1 or not config.cluster.colocate
    return contexts * CUDA_CONTEXT_BYTES + (NCCL_BYTES if is_linked else 0)


def _workspace_bytes(config: TrainConfig, model: ModelFacts, num_sequences: int) -> int:
    """What an engine's GPU holds beside weights and cache in a step: the widest tensors of a layer, float32 logits with their
    log-probabilities and the sampler's copy, captured graphs."""
    rollout = config.rollout
    arguments, size = rollout.engine_args, rollout.tensor_parallel_size
    tokens = rollout.max_num_batched_tokens("cuda")
    layer = 2 * model.intermediate_size // size + 6 * model.hidden_size
    graphs = 0 if arguments.get("enforce_eager") else CUDA_GRAPH_BYTES
    return tokens * layer * 2 + 12 * num_sequences * model.vocab_size + graphs + (NCCL_BYTES if size > 1 else 0)


def engine_memory(
    config: TrainConfig, model: ModelFacts, weight_bytes: int, longest: int, samples: int, device: str
) -> EngineMemory:
    """One GPU of an engine (or the engine on a CPU) that has `samples` responses of `longest` tokens to sample."""
    rollout, arguments = config.rollout, config.rollout.engine_args
    size = rollout.tensor_parallel_size
    values = 1 if "fp8" in str(arguments.get("kv_cache_dtype", "")) else DTYPE_BYTES[rollout.asked_dtype]
    pool = arguments.get("kv_cache_memory_bytes", CPU_KV_CACHE_BYTES if device == "cpu" else None)
    num_sequences = min(samples, rollout.max_num_seqs)
    return EngineMemory(
        weights=weight_bytes // size,
        workspace=_workspace_bytes(config, model, num_sequences) if device == "cuda" else 0,
        kv_per_sequence=longest * model.kv_bytes_per_token(values) // min(size, model.num_kv_heads),
        num_sequences=num_sequences,
        kv_pool=None if pool is None else int(pool),
    )
