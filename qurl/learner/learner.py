"""One rank of the trainer: full-precision policy, optimizer, critic, and the source of the weights that the pool samples from.

Consumes the TrainingSamples of an iteration, produces new weights and metrics. Collective: every rank calls the same methods in
the same order. Each sequence's weight in the loss is fixed before anything is split, and DeepSpeed's mean over ranks is undone,
so how samples are packed and spread changes no gradient beyond float error. All ranks run the same number of micro-batches,
padded with empty ones, so that collectives inside forward and backward always find their partners."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed, nn

from qurl.algorithms import POLICY_LOSSES, mismatch_parts, token_weights
from qurl.config import (
    AlgorithmConfig,
    CriticConfig,
    KLPlacement,
    LearnerConfig,
    LearnerDtype,
    ModelConfig,
    QuantizationConfig,
    SyncConfig,
    UpdateAwareness,
)
from qurl.errors import NonFiniteLoss
from qurl.kept_tokens import unpack_sets
from qurl.learner.critic import Critic
from qurl.learner.engine import (
    apply_gradients,
    initialize,
    initialize_frozen,
    join_process_group,
    load_engine,
    save_engine,
)
from qurl.learner.huggingface import copy_tokenizer, load_model
from qurl.learner.objective import Objective
from qurl.learner.packing import empty_micro_batch, pack, padding_fraction, spread
from qurl.learner.policy import Policy
from qurl.learner.probe import perturbed_inputs, quantized_arithmetic
from qurl.learner.random_state import random_states, restore_random_states, seed_everything
from qurl.learner.reward_penalty import charge_kl
from qurl.learner.value_targets import fill_value_targets
from qurl.learner.weights import iter_all_weights, iter_share, linear_names
from qurl.observability.metrics import Last, Mean, Metric
from qurl.quantization import (
    QuantizationFormat,
    fold_invariant_scaling,
    resolved_format,
    scaled_linear_weights,
    select_targets,
)
from qurl.sync import EngineHandle, SendReport, WeightSender
from qurl.types import MicroBatch, TrainingSample

TAG = "deepspeed"
"""Folder of the policy's engine's files in a checkpoint."""

RELATIVE_ROUNDING = 1e-6
"""By how much float32 sums in another order differ; 8 units of rounding. Coarser dtypes have their own."""

WIRE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What an iteration did. reports: to be reduced together with those of the other ranks."""

    reports: list[dict[str, Metric]]
    timings: dict[str, float]  # time/* keys, seconds


@dataclass(kw_only=True, slots=True)
class _MiniBatch:
    """This rank's part of one optimizer step."""

    samples: list[TrainingSample]
    batches: list[MicroBatch]
    token_weights: list[Tensor]  # [B, L] float32 per micro-batch; over all ranks the loss is sum(weight * per-token loss)
    num_tokens: int  # trained ones, over all ranks
    mean_weight: float = 1.0  # of the correction, with normalize_weights
    skipped: MicroBatch | None = None  # one of those that an empty one stands for, where all advantages of all ranks are 0


LossOf = Callable[[_MiniBatch, int], tuple[Tensor, dict[str, Metric]]]
"""(its part of the mini-batch loss, metrics) of the micro-batch with that index."""


class Learner:
    """The policy on one rank. See the module docstring; `LearnerGroup` drives several from one place."""

    def __init__(
        self,
        model: ModelConfig,
        learner: LearnerConfig,
        critic: CriticConfig,
        algorithm: AlgorithmConfig,
        quantization: QuantizationConfig,
        sync: SyncConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        master_address: str = "127.0.0.1",
        master_port: int = 0,
        device: str = "cpu",
        temperature: float = 1.0,
        engine_dtype: str = "float32",
        threads: int = 0,
        seed: int = 0,
    ):
        """temperature: rollout.temperature. engine_dtype: what weights that are not quantized travel as ("float32",
        "bfloat16", "float16"). threads: of torch, 0 leaves its default. master_port 0 is for world_size 1.

        Raises ValueError for what the configuration gets wrong, OSError where model.path cannot be read."""
        if threads:
            torch.set_num_threads(threads)
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self._model_config, self._config, self._algorithm = model, learner, algorithm
        self._objective = Objective(algorithm)
        join_process_group(rank, world_size, master_address, master_port, self.device)
        seed_everything(seed)
        weights = load_model(model)
        compute = torch.bfloat16 if learner.dtype is LearnerDtype.bfloat16 else torch.float32
        self._rounding = max(RELATIVE_ROUNDING, *(torch.finfo(dtype).eps for dtype in (compute, _wire_dtype(engine_dtype))))
        rounds = quantization.update_awareness is UpdateAwareness.stochastic_rounding
        targets = _targets(weights, quantization)
        self._sender = WeightSender(
            sync, _format(quantization, targets), targets, _wire_dtype(engine_dtype), rank, world_size,
            rounding_seed=seed if rounds else None,
        )
        if quantization.update_awareness is UpdateAwareness.invariant_scaling:
            fold_invariant_scaling(weights, quantization.invariant_scale)
        self.model = weights
        policy = Policy(
            weights, temperature=temperature, activation_checkpointing=learner.activation_checkpointing,
            entropy_gradient=bool(algorithm.entropy_coefficient),
        )
        scaled = {f"model.{name}" for name in scaled_linear_weights(weights)} if learner.scaled_layers_multiplier != 1 else set()
        self._engine = initialize(policy, learner, self.device, scaled)
        self._reference = None
        if algorithm.kl.coefficient:
            self._reference = initialize_frozen(Policy(load_model(model), temperature=temperature), learner, self.device)
        self._critic = Critic(critic, model, learner, self.device) if algorithm.uses_critic else None
        self.release_memory()  # of whole models, before ranks shared them; an engine on this GPU may want it

    @property
    def num_optimizer_steps(self) -> int:
        """The policy's, since the start of the run, through checkpoints."""
        return int(self._engine.global_steps)

    def train_step(
        self, mini_batches: Sequence[list[TrainingSample]], failure_dir: Path | None = None, trains_policy: bool = True
    ) -> StepResult:
        """One optimizer step per mini-batch: of the critic, where there is one, then of the policy, unless trains_policy is False.

        mini_batches: this rank's share, of equal length on all ranks. Old logprobs and values are those of the weights at entry.
        failure_dir: where the samples of a failing mini-batch are written.
        Raises NonFiniteLoss, on all ranks alike, before a step that is not finite is applied."""
        start = time.perf_counter()
        steps = self._plan(mini_batches, skips=self._gradient_is_of_advantages)
        reports = self._prepare(steps, trains_policy)
        logprobs_done = time.perf_counter()
        if self._critic is not None:
            reports += self._optimizer_steps("critic", self._critic.engine, steps, self._critic_loss, failure_dir)
        if trains_policy:
            reports += self._optimizer_steps("policy", self._engine, steps, self._policy_loss, failure_dir)
        reports.append({
            "policy/num_optimizer_steps": Last(len(steps) if trains_policy else 0),
            "policy/num_skipped_mini_batches": Last(sum(step.skipped is not None for step in steps)),
            "policy/padding_fraction": Mean(padding_fraction(
                [batch for step in steps for batch in step.batches if step.skipped is None]
            )),
        })
        timings = {"time/logprob_s": logprobs_done - start, "time/update_s": time.perf_counter() - logprobs_done}
        return StepResult(reports=reports, timings=timings)

    def probe(self, samples: list[TrainingSample], version: int) -> StepResult:
        """Why the policy that sampled differs from the current one (qurl.algorithms.mismatch_parts); no weight changes.

        samples: this rank's share, may be empty. version: of the current weights, as sent last."""
        start = time.perf_counter()
        [step] = self._plan([samples])
        reports: list[dict[str, Metric]] = []
        for batch in step.batches:
            old = self._logprobs(self._engine, batch)
            with quantized_arithmetic(self.model, self._sender):
                quantized = self._logprobs(self._engine, batch)
            with perturbed_inputs(self.model, self._rounding), self._arithmetic_of_engines():
                perturbed = self._logprobs(self._engine, batch)
            is_stale = spread([float(sample.weight_version < version) for sample in samples], batch) > 0
            reports.append(mismatch_parts(
                old, quantized, batch.rollout_logprobs, batch.loss_mask, is_stale, is_quantized=not self._sender.is_fallen_back,
                perturbed_logprobs=perturbed,
            ))
        return StepResult(reports=reports, timings={"time/probe_s": time.perf_counter() - start})

    @property
    def _gradient_is_of_advantages(self) -> bool:
        """Whether a mini-batch without advantages has a gradient of exactly zero. KL, entropy and a critic have gradients of their
        own, and so may a policy loss of the user's."""
        algorithm = self._algorithm
        others = algorithm.kl.coefficient or algorithm.entropy_coefficient or algorithm.uses_critic
        return not others and algorithm.policy_loss.name in POLICY_LOSSES

    def _arithmetic_of_engines(self) -> AbstractContextManager[None]:
        """What engines compute with at present: full precision in that fallback, else what is configured."""
        return nullcontext() if self._sender.is_fallen_back else quantized_arithmetic(self.model, self._sender)

    def _plan(self, mini_batches: Sequence[list[TrainingSample]], skips: bool = False) -> list[_MiniBatch]:
        """Pack, agree with the other ranks on the number of micro-batches, and weigh sequences over all ranks.

        skips: put one empty micro-batch in place of a mini-batch whose advantages are all 0, on all ranks. Its gradient is zero as
        that of the whole would be, so the optimizer's step is the same bit for bit: moments decay, weights follow them and decay,
        step count and learning-rate schedule go on. Forward and backward are saved, but for one forward of one micro-batch, which
        says how far rollout is from old."""
        packed = [pack(samples, self._config.max_tokens_per_micro_batch) for samples in mini_batches]
        lengths = [[sum(sample.loss_mask) for sample in samples] for samples in mini_batches]
        advantaged = [any(any(sample.advantages) for sample in samples) for samples in mini_batches]
        mine = [(len(batches), *rest) for batches, *rest in zip(packed, lengths, advantaged, strict=True)]
        everyone: list[Any] = [None] * self.world_size
        distributed.all_gather_object(everyone, mine)
        if len({len(theirs) for theirs in everyone}) != 1:
            raise ValueError(f"ranks were given {[len(theirs) for theirs in everyone]} mini-batches; give each the same number")
        steps = []
        for samples, batches, *theirs in zip(mini_batches, packed, *everyone, strict=True):
            is_skipped = skips and not any(has_advantage for *_, has_advantage in theirs)
            num_batches = max(1, *(count for count, *_ in theirs))
            batches += [empty_micro_batch() for _ in range(num_batches - len(batches))]
            skipped = _to(batches[0], self.device) if is_skipped else None
            batches = [empty_micro_batch()] if is_skipped else batches
            weights = token_weights([n for _, counts, _ in theirs for n in counts], self._algorithm.policy_loss)
            first = sum(len(counts) for _, counts, _ in theirs[: self.rank])
            own = weights[first : first + len(samples)]
            batches = [_to(batch, self.device) for batch in batches]
            steps.append(_MiniBatch(
                samples=samples, batches=batches, token_weights=[spread(own, batch) for batch in batches],
                num_tokens=sum(n for _, counts, _ in theirs for n in counts), skipped=skipped,
            ))
        return steps

    def _prepare(self, steps: Sequence[_MiniBatch], trains_policy: bool) -> list[dict[str, Metric]]:
        """Fill what the optimizer steps need to know of the weights at entry and of the reference. Returns metrics."""
        in_reward = self._reference is not None and self._algorithm.kl.placement is KLPlacement.reward
        normalizes = trains_policy and self._algorithm.correction.normalize_weights
        several = trains_policy and len(steps) > 1
        needs_old = several or in_reward or normalizes  # else the training forward itself runs at the old weights
        for step in steps:
            for batch in step.batches:
                if needs_old:
                    batch.old_logprobs = self._logprobs(self._engine, batch)
                if self._reference is not None:
                    batch.ref_logprobs = self._logprobs(self._reference, batch)
                if self._critic is not None:
                    batch.old_values = self._critic.values(batch)
            if normalizes:
                step.mean_weight = self._objective.mean_weight(step.batches, self.device)
        mini_batches = [(step.samples, step.batches) for step in steps]
        if self._critic is not None:
            return [fill_value_targets(mini_batches, self._algorithm)]
        return [charge_kl(mini_batches, self._algorithm)] if in_reward else []

    @torch.no_grad()
    def _logprobs(self, policy: Any, batch: MicroBatch) -> Tensor:
        return policy(batch.input_ids, batch.position_ids, batch.loss_mask, batch.kept_tokens)[0]

    def _policy_loss(self, step: _MiniBatch, index: int) -> tuple[Tensor, dict[str, Metric]]:
        batch = step.batches[index]
        logprobs, entropy = self._engine(batch.input_ids, batch.position_ids, batch.loss_mask, batch.kept_tokens)
        return self._objective.loss(batch, logprobs, entropy, step.token_weights[index], step.mean_weight)

    @torch.no_grad()
    def _report_of_skipped(self, step: _MiniBatch, batch: MicroBatch) -> dict[str, Metric]:
        logprobs, entropy = self._engine(batch.input_ids, batch.position_ids, batch.loss_mask, batch.kept_tokens)
        return self._objective.loss(batch, logprobs, entropy, torch.zeros_like(logprobs), step.mean_weight)[1]

    def _critic_loss(self, step: _MiniBatch, index: int) -> tuple[Tensor, dict[str, Metric]]:
        assert self._critic is not None
        return self._critic.loss(step.batches[index], step.num_tokens)

    def _optimizer_steps(
        self, name: str, engine: Any, steps: Sequence[_MiniBatch], loss_of: LossOf, failure_dir: Path | None
    ) -> list[dict[str, Metric]]:
        """One step of `engine` per mini-batch; `name` is its area among the metrics."""
        reports = []
        for step in steps:
            suspects: list[str] = []
            learning_rate = engine.get_lr()[0]
            if step.skipped is not None:
                reports.append(self._report_of_skipped(step, step.skipped))
            for i, batch in enumerate(step.batches):
                is_last = i == len(step.batches) - 1
                engine.set_gradient_accumulation_boundary(is_last)
                loss, report = loss_of(step, i)
                if step.skipped is None:
                    reports.append(report)
                if not math.isfinite(loss.item()):
                    suspects += [step.samples[index].sample_id for index in batch.sample_indices]
                if is_last and suspects:
                    loss = loss * math.nan  # every rank learns of it through the gradient and skips the step together
                engine.backward(loss * self.world_size, scale_wrt_gas=False)
            grad_norm = apply_gradients(engine)
            if grad_norm is None:
                self._fail(f"{name}'s optimizer step {engine.global_steps}", step, suspects, failure_dir)
            reports.append({f"{name}/grad_norm": Mean(grad_norm), f"{name}/learning_rate": Last(learning_rate)})
        return reports

    def _fail(self, where: str, step: _MiniBatch, suspects: list[str], failure_dir: Path | None) -> NoReturn:
        what = f"loss is not finite in {len(suspects)} samples" if suspects else "gradient is not finite, or another rank's loss"
        message = f"{where}, rank {self.rank}: {what}; the step was not applied"
        if failure_dir is not None:
            path = Path(failure_dir) / f"nonfinite_rank{self.rank}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"suspects": suspects, "samples": [_as_json(sample) for sample in step.samples]}))
            message += f"; its samples are in {path}"
        raise NonFiniteLoss(message, suspects)

    def iter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) of this rank's share; under ZeRO-3 all ranks must iterate to the end."""
        return iter_share(self.model, self.rank, self.world_size)

    def send_weights(self, version: int, engines: Sequence[EngineHandle], full: bool = False) -> SendReport:
        """Encode this rank's share of the weights and stream it to the engines as `version`. Raises SyncError."""
        tensors = self.iter_weights()
        try:
            return self._sender.send(version, tensors, list(engines), full)
        finally:
            for _ in tensors:  # after an error, still take part in gathering, or the other ranks would wait forever
                pass

    def set_fallback(self, fallback: QuantizationConfig | None) -> None:
        """What engines hold from the next version on instead of the configured quantization; None: that one. See WeightSender."""
        self._sender.set_fallback(None if fallback is None else _format(fallback, self._sender.targets))

    def decoded_weights(self, start: int, count: int) -> dict[str, Tensor]:
        """What an engine must hold after send_weights: `count` linear modules from position `start` on, going round, decoded to
        float32. All ranks call it; each returns all of them."""
        names = linear_names(self.model)
        chosen = {names[(start + i) % len(names)] for i in range(min(count, len(names)))}
        weights = ((name.removesuffix(".weight"), weight) for name, weight in iter_all_weights(self.model))
        return {module: self._sender.decoded(module, weight) for module, weight in weights if module in chosen}

    def save_checkpoint(self, folder: Path) -> None:
        """Write weights, optimizer, schedule and random states, the critic's too; every rank writes its part."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_engine(self._engine, folder, TAG)
        if self._critic is not None:
            self._critic.save(folder)
        torch.save(random_states(self.device), folder / f"random_rank{self.rank}.pt")
        if self.rank == 0:
            (folder / "learner.json").write_text(json.dumps(self._identity()))

    def load_checkpoint(self, folder: Path) -> None:
        """Continue bit for bit from what save_checkpoint wrote. Invariant scaling is in the weights read.

        Raises ValueError where it was written with another number of ranks, ZeRO stage or dtype, or without a critic that this
        learner has, FileNotFoundError where parts are missing."""
        folder = Path(folder)
        found = json.loads((folder / "learner.json").read_text())
        if found != self._identity():
            raise ValueError(f"checkpoint {folder} was written with {found}, this run has {self._identity()}; set them alike")
        load_engine(self._engine, folder, TAG)
        if self._critic is not None:
            self._critic.load(folder)
        restore_random_states(torch.load(folder / f"random_rank{self.rank}.pt", weights_only=False), self.device)

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the learner that loads it."""
        identity: dict[str, Any] = {
            "learner.num_ranks": self.world_size,
            "learner.zero_stage": self._config.zero_stage,
            "learner.dtype": self._config.dtype.value,
        }
        if self._config.scaled_layers_multiplier != 1:  # the optimizer has one more group of parameters
            identity["learner.scaled_layers_multiplier"] = self._config.scaled_layers_multiplier
        if self._critic is not None:
            identity["algorithm.advantage.name"] = self._algorithm.advantage.name
        return identity

    def release_memory(self) -> None:
        """Give memory of the GPU that is cached and not used back, so that an engine that shares it can start."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def export_hf(self, folder: Path) -> None:
        """Write a Hugging Face folder: weights, config and the tokenizer's files. All ranks call it; rank 0 writes."""
        state = {name: tensor.cpu() for name, tensor in iter_all_weights(self.model) if self.rank == 0}
        if self.rank == 0:
            self.model.save_pretrained(folder, state_dict=state)
            copy_tokenizer(self._model_config, Path(folder))
        distributed.barrier()


def _targets(model: nn.Module, quantization: QuantizationConfig) -> frozenset[str]:
    if quantization.format == "none":
        return frozenset()
    return select_targets(linear_names(model), quantization.ignore)


def _format(quantization: QuantizationConfig, targets: frozenset[str]) -> QuantizationFormat:
    return resolved_format(
        quantization.format, codebooks=quantization.codebooks, precision=quantization.precision, rotation=quantization.rotation,
        group_size=quantization.group_size, layers=sorted(targets),
    )


def _wire_dtype(name: str) -> torch.dtype:
    if name not in WIRE_DTYPES:
        raise ValueError(f"rollout.engine_args.dtype={name!r}: weights cannot be sent as that; use one of {', '.join(WIRE_DTYPES)}")
    return getattr(torch, name)


def _as_json(sample: TrainingSample) -> dict[str, Any]:
    """The sample's fields, kept tokens as lists of token ids."""
    kept = None if sample.kept_tokens is None else [ids.tolist() for ids in unpack_sets(sample.kept_tokens)]
    return asdict(replace(sample, kept_tokens=None)) | {"kept_tokens": kept}


def _to(batch: MicroBatch, device: torch.device) -> MicroBatch:
    moved: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        moved[field.name] = value.to(device) if isinstance(value, Tensor) else value
    return MicroBatch(**moved)
