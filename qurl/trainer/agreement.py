"""Whether engines and learner compute the same function: asked once, when the first weights have been published.

Nothing else would notice. A config.json that vLLM reads otherwise than transformers, a norm or a bias that one of
them forgets, a mask that differs: samples look as usual, and training corrects a mismatch that has nothing to do
with quantization. So a few prompts are sampled on every engine, and the learner computes the logprobs of these
tokens with the engine's own codes (Learner.probe). What is left is the order of sums and the dtype. Two things
make that more than 1e-12 nats:

    dtype          16 bits move logprobs: FLOOR, far above what was measured on models in bfloat16 (1e-4 to 1e-2)
    flipped codes  rounding moves activations to other codes, which amplifies from layer to layer. Two correct INT8
                   engines of a real model are as far apart as INT8 is from full precision (0.04 beside 0.03). That
                   distance is measured here too; SHARE times it is allowed, which the noise of 256 tokens and the
                   sum of several such draws stay far below.

A model of random weights whose attention is wrong has 0.2 nats, beside 0.0005 that INT8 explains; a trained model
has more."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from qurl.config import TrainConfig
from qurl.errors import ConfigError
from qurl.learner.group import LearnerGroup
from qurl.rollout.pool import RolloutPool
from qurl.rollout.request import Sampling
from qurl.trainer.batch import training_sample
from qurl.trainer.weights import PublishedWeights
from qurl.types import Prompt, TrainingSample

logger = logging.getLogger(__name__)

NUM_PROMPTS, NUM_SAMPLES, NUM_TOKENS = 2, 4, 32
"""For each engine: 256 tokens, a second or two on any machine that the model suits."""
MAX_ENGINES = 8
"""All engines of a run have the same configuration; that many are looked at."""
FLOOR = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
"""Divergence in nats that a dtype explains, without quantization."""
SHARE = 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """What one engine sampled, under the engine and under the learner; all in nats, means over its tokens."""

    engine_id: str
    num_tokens: int
    kl: float  # of the engine's distribution from the learner's with the engine's codes
    engine_logprob: float
    learner_logprob: float  # with the engine's codes
    quantization_kl: float  # of the learner's distribution with these codes from its own; 0 without quantization

    def explained(self, config: TrainConfig) -> float:
        """The largest `kl` that dtypes and quantization explain, or probe.start_max_kl."""
        if config.probe.start_max_kl is not None:
            return config.probe.start_max_kl
        dtypes = (config.rollout.dtype, config.learner.dtype.value)
        return max(FLOOR[dtype] for dtype in dtypes) + SHARE * self.quantization_kl

    def check(self, config: TrainConfig) -> None:
        """Raise ConfigError where the functions differ by more than `explained`."""
        explained = self.explained(config)
        if self.kl <= explained:
            return
        name = config.quantization.format
        raise ConfigError(
            f"model.path={config.model.path}: engine {self.engine_id} and the learner compute different functions. Over "
            f"{self.num_tokens} sampled tokens the engine's mean logprob is {self.engine_logprob:.4g} and the learner's, with the "
            f"same weights, {self.learner_logprob:.4g}; their divergence is {self.kl:.3g} nats, of which quantization={name} and "
            f"dtype {config.rollout.dtype} explain {explained:.3g}. vLLM and transformers read this model's config.json "
            "differently or one of them does not support it: take another model, or set probe.start_max_kl to train all the same"
        )


async def check_agreement(
    config: TrainConfig,
    prompts: Sequence[Prompt],
    pool: RolloutPool,
    learner: LearnerGroup,
    weights: PublishedWeights,
    version: int,
) -> None:
    """Sample the first prompts on every engine and compare with the learner, both at weights `version`.

    Raises ConfigError where they compute different functions, and what the pool and the learner raise."""
    sampling = Sampling(
        temperature=config.rollout.temperature, top_p=1.0, top_k=-1, stop_token_ids=(),
        max_tokens=min(NUM_TOKENS, config.longest_rollout_tokens),
    )  # fmt: skip
    rounds = range(min(config.rollout.num_engines, MAX_ENGINES))
    groups = await asyncio.gather(*(
        pool.generate(prompt, sampling, NUM_SAMPLES, request_id=f"agreement/{index}/{prompt.prompt_id}")
        for index in rounds for prompt in prompts[:NUM_PROMPTS]
    ))  # the pool gives each engine as many
    by_engine: dict[str, list[TrainingSample]] = defaultdict(list)
    for group in groups:
        for rollout in group.rollouts:
            by_engine[rollout.engine_id].append(training_sample(group, rollout, 0.0, 0.0))
    for engine_id, samples in sorted(by_engine.items()):
        async with weights.lock:
            metrics, _ = await learner.probe(samples, version)
        found = _agreement(engine_id, samples, {key: metric.value for key, metric in metrics.items()})
        logger.info("engine %s and learner: %.3g nats over %d tokens, %.3g explained", engine_id, found.kl, found.num_tokens,
                    found.explained(config))  # fmt: skip
        found.check(config)


def _agreement(engine_id: str, samples: Sequence[TrainingSample], metrics: dict[str, float]) -> Agreement:
    """From the samples of one engine and what Learner.probe says of them."""
    engine = [
        logprob
        for sample in samples
        for logprob, chosen in zip(sample.rollout_logprobs, sample.loss_mask, strict=True)
        if chosen
    ]
    mean = sum(engine) / len(engine)
    return Agreement(
        engine_id=engine_id,
        num_tokens=len(engine),
        kl=metrics.get("mismatch/engine_kl", math.nan),
        engine_logprob=mean,
        learner_logprob=mean - metrics.get("mismatch/engine_log_ratio", math.nan),
        quantization_kl=metrics["mismatch/quantization_kl"],
    )
