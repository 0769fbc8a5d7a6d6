"""DeepSpeed around policy and critic: process group, optimizer, master weights. The only file that imports deepspeed."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from qurl.config import LearnerConfig, LearnerDtype
from qurl.learner.deepspeed_config import deepspeed_config

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""How long ranks wait in a collective: rank 0 may be writing an export of many GB to a slow disk meanwhile. A rank that died is
noticed by the driver within seconds, whatever this says."""


def join_process_group(rank: int, world_size: int, address: str, port: int, device: torch.device) -> None:
    """Meet the other ranks (gloo on the CPU, nccl on GPUs); a group that already exists is used.

    Raises RuntimeError where the existing group has another rank or size."""
    deepspeed = _import_deepspeed(device)
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed reads the device from there
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(
            backend, init_method=f"tcp://{address}:{port}", rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
    found = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if found != (rank, world_size):
        raise RuntimeError(f"this process is rank {found[0]} of {found[1]} already; it cannot be rank {rank} of {world_size}")
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


def initialize(policy: nn.Module, config: LearnerConfig, device: torch.device, scaled: Collection[str] = ()) -> Any:
    """A DeepSpeed engine that trains `policy` with AdamW; master weights are the float32 values that `policy` holds now.

    scaled: names of the matrices whose learning rate, but not decay, is multiplied by learner.scaled_layers_multiplier.

    DeepSpeed derives bfloat16 masters from weights already rounded to bfloat16, which would undo what a checkpoint in float32
    or invariant scaling put there; so they are set once more from the originals. Matrices decay, vectors (norms, biases) do not."""
    deepspeed = _import_deepspeed(device)
    originals = {name: parameter.data for name, parameter in policy.named_parameters()}
    parameters = list(policy.parameters())
    groups = _parameter_groups(policy, config, scaled)
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.adam_betas[0], config.adam_betas[1]), eps=config.adam_epsilon, fused=True
    )
    engine, *_ = deepspeed.initialize(
        model=policy,
        optimizer=optimizer,
        lr_scheduler=lambda basic: LambdaLR(basic, lambda step: min(1.0, (step + 1) / max(1, config.warmup_steps))),
        config=deepspeed_config(config, sum(p.numel() for p in parameters)),
        dist_init_required=False,
    )
    if config.dtype is LearnerDtype.bfloat16:
        for name, parameter in policy.named_parameters():
            _set_master(parameter, originals.pop(name).to(device))
    extend_timeouts()
    return engine


def extend_timeouts() -> None:
    """Give every process group COLLECTIVE_TIMEOUT, those that DeepSpeed made too: a new group does not inherit the timeout of the
    default group, but has 10 minutes with NCCL and 30 with gloo."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT, group)


def _set_master(parameter: Any, value: torch.Tensor) -> None:
    """Set the float32 master of a parameter, or this rank's part of it under ZeRO-3.

    There DeepSpeed's safe_set_full_fp32_param fails for sizes that the number of ranks does not divide, such as a bias of one
    number: the last part is padded, and the value is not."""
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        utils.safe_set_full_fp32_param(parameter, value)
        return
    size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
    padded = value.new_zeros(size * torch.distributed.get_world_size(group))
    padded[: value.numel()] = value.flatten()
    utils.safe_set_local_fp32_param(parameter, padded[size * torch.distributed.get_rank(group) :][:size])


def _parameter_groups(policy: nn.Module, config: LearnerConfig, scaled: Collection[str]) -> list[dict[str, Any]]:
    """The first has learner.learning_rate. AdamW decays by learning rate times weight_decay, hence the division."""
    named, factor = list(policy.named_parameters()), config.scaled_layers_multiplier
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if p.ndim >= 2 and name not in scaled], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    if scaled:
        groups.append({
            "params": [p for name, p in named if name in scaled],
            "lr": factor * config.learning_rate,
            "weight_decay": config.weight_decay / factor,
        })
    return groups


def initialize_frozen(model: nn.Module, config: LearnerConfig, device: torch.device) -> nn.Module:
    """A model for inference in the learner's dtype, partitioned over ranks where the policy is."""
    model.requires_grad_(False)
    dtype = torch.bfloat16 if config.dtype is LearnerDtype.bfloat16 else torch.float32
    if config.zero_stage < 3:
        return model.to(device, dtype)
    json = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype is torch.bfloat16},
        "steps_per_print": None,
    }
    engine, *_ = _import_deepspeed(device).initialize(model=model, config=json, dist_init_required=False)
    extend_timeouts()
    return engine


def apply_gradients(engine: Any) -> float | None:
    """The optimizer step at an accumulation boundary; returns the global gradient norm before clipping.

    None: a gradient is not finite on some rank, and no rank changed a weight or an optimizer state. DeepSpeed checks this under
    ZeRO; at stage 0 gradients are already equal on all ranks and are checked here."""
    if not engine.zero_optimization():
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        if not norm.isfinite():
            engine.zero_grad()
            return None
        engine.step()
        return float(norm)
    engine.step()
    return float(engine.get_global_grad_norm()) if engine.was_step_applied() else None


def save_engine(engine: Any, folder: Path, tag: str) -> None:
    """Write this rank's part of an engine's weights, optimizer and schedule below `folder`/`tag`."""
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False)


def load_engine(engine: Any, folder: Path, tag: str) -> None:
    """Continue from save_engine. Raises FileNotFoundError where parts are missing."""
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        raise FileNotFoundError(f"checkpoint {folder} has no readable {tag}/ for rank {torch.distributed.get_rank()}")


def gathered(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    """Makes partitioned (ZeRO-3) parameters whole inside the context; every rank must enter it. Others stay as they are."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


def _import_deepspeed(device: torch.device) -> ModuleType:
    """deepspeed decides on its accelerator when it is imported."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # of tensor-parallel inference alone, and a minute's compiling
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed
