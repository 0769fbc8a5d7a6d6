"""The trained policy in full precision: what an arm is really worth, whatever its rollouts were quantized to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qurl.config import TrainConfig
from qurl.config.compose import load_config
from qurl.config.placement import place
from qurl.learner.learner import Learner
from qurl.rewards import VOTES, RewardPool
from qurl.trainer.evaluate import dataset_metrics
from qurl.trainer.export import latest_checkpoint
from qurl.trainer.prepare import load_prompts, load_tokenizer, stop_token_ids
from qurl.types import Prompt, Rollout, RolloutGroup, ScoredGroup

BATCH = 64


def full_precision_accuracy(run_dir: Path) -> dict[str, float]:
    """Greedy accuracy on each of data.eval, by name, of a run's latest checkpoint, decoded by transformers in float32.

    For runs on one learner rank, of models that transformers decodes in reasonable time."""
    config = load_config(run_dir / "config.yaml")
    tokenizer = load_tokenizer(config)
    _, datasets = load_prompts(config, tokenizer)
    learner = Learner(
        config.model, config.learner, config.critic, config.algorithm, config.quantization, config.sync, seed=config.seed,
        device=place(config).device,
    )  # fmt: skip
    learner.load_checkpoint(latest_checkpoint(run_dir))
    stop_ids = stop_token_ids(config, tokenizer)
    groups = {name: _decode(learner.model.eval(), prompts, config, tokenizer, stop_ids) for name, prompts in datasets.items()}
    scored = asyncio.run(_score(config, groups))
    vote = VOTES.get(config.reward.function)
    return {name: dataset_metrics(name, found, vote)[f"eval/{name}/avg_at_k"] for name, found in scored.items()}


@torch.no_grad()
def _decode(model: Any, prompts: Sequence[Prompt], config: TrainConfig, tokenizer: Any, stop_ids: list[int]) -> list[RolloutGroup]:
    groups: list[RolloutGroup] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        width = max(len(prompt.token_ids) for prompt in batch)
        padded = torch.tensor([[stop_ids[0]] * (width - len(p.token_ids)) + p.token_ids for p in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in batch], device=model.device)
        found = model.generate(
            padded, attention_mask=mask, do_sample=False, max_new_tokens=config.longest_rollout_tokens, eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
        )  # fmt: skip
        for prompt, row in zip(batch, found[:, width:].tolist(), strict=True):
            groups.append(RolloutGroup(prompt=prompt, rollouts=[_rollout(row, stop_ids, tokenizer)]))
    return groups


def _rollout(row: list[int], stop_ids: list[int], tokenizer: Any) -> Rollout:
    """A greedy response: `row` up to the first stop token."""
    end = next((i + 1 for i, token in enumerate(row) if token in stop_ids), None)
    ids = row[:end]
    return Rollout(
        sample_index=0, token_ids=ids, rollout_logprobs=[0.0] * len(ids), weight_versions=[0] * len(ids),
        finish_reason="length" if end is None else "stop", text=tokenizer.decode(ids, skip_special_tokens=True),
        engine_id="transformers", seed=0,
    )  # fmt: skip


async def _score(config: TrainConfig, groups: dict[str, list[RolloutGroup]]) -> dict[str, list[ScoredGroup]]:
    pool = RewardPool(config.reward)
    await pool.start()
    try:
        return {name: list(await asyncio.gather(*map(pool.score, of_dataset))) for name, of_dataset in groups.items()}
    finally:
        await pool.close()
