"""What difference between engine and learner a start accepts; the figures are measured ones."""

import asyncio
import itertools
import logging

import pytest

from qurl.config import LearnerDtype, TrainConfig
from qurl.errors import ConfigError
from qurl.observability.metrics import Last
from qurl.trainer.agreement import MAX_ENGINES, NUM_TOKENS, check_agreement
from qurl.types import Prompt, Rollout, RolloutGroup

PROMPTS = [Prompt(prompt_id=f"p{i}", token_ids=[5, 6, 7], text="", ground_truth="", data_source="") for i in range(5)]


def config(format="int8", dtype="float32", learner="float32", num_engines=1, **probe):
    made = TrainConfig()
    made.model.path = "m"
    made.quantization.format = format
    made.rollout.dtype = dtype  # resolved, as trainer.run does
    made.rollout.num_engines = num_engines
    made.learner.dtype = LearnerDtype(learner)
    for name, value in probe.items():
        setattr(made.probe, name, value)
    return made


class World:
    """Pool, learner and weights at once: engine i answers every num_engines-th request."""

    def __init__(self, config, kls, quantization_kl=0.0):
        self.config, self.kls, self.quantization_kl = config, kls, quantization_kl
        self.lock = asyncio.Lock()
        self.engines = itertools.cycle(range(config.rollout.num_engines))
        self.sampled, self.probed = [], []

    async def generate(self, prompt, sampling, num_samples, *, request_id):
        assert not self.lock.locked()  # a lost engine's successor must be able to get its weights
        self.sampled.append((request_id, sampling.max_tokens, sampling.top_p, sampling.stop_token_ids))
        engine = str(next(self.engines))
        return RolloutGroup(prompt=prompt, rollouts=[
            Rollout(sample_index=i, token_ids=[1] * 4, rollout_logprobs=[-2.0] * 4, weight_versions=[7] * 4, finish_reason="length",
                    text="", engine_id=engine, seed=i) for i in range(num_samples)
        ])  # fmt: skip

    async def probe(self, samples, version):
        assert self.lock.locked() and version == 7 and all(sample.weight_version == 7 for sample in samples)
        assert all(sample.token_ids == [5, 6, 7, 1, 1, 1, 1] and sum(sample.loss_mask) == 4 for sample in samples)
        kl = self.kls[len(self.probed)]
        self.probed.append(len(samples))
        found = {"mismatch/engine_kl": kl, "mismatch/engine_log_ratio": 0.5, "mismatch/quantization_kl": self.quantization_kl}
        return {key: Last(value) for key, value in found.items()}, {}

    def check(self):
        asyncio.run(check_agreement(self.config, PROMPTS, self, self, self, 7))


ACCEPTED = {
    "toy, none": (config("none"), 1e-12, 0.0),
    "real model, none": (config("none"), 1e-8, 0.0),
    "toy, int8": (config(), 1e-6, 5e-4),
    "real model, int8: flipped codes": (config(), 0.042, 0.031),
    "real model, int8, unlucky tokens": (config(), 0.08, 0.015),
    "real model, mxfp4": (config("mxfp4"), 1.3, 1.36),
    "0.4B, bfloat16": (config("none", "bfloat16"), 1e-4, 0.0),
    "mixture of experts, bfloat16": (config("none", "bfloat16", "bfloat16"), 0.02, 0.0),
    "toy, int8 in bfloat16": (config(dtype="bfloat16"), 3e-4, 4e-5),
    "learner in bfloat16": (config("none", learner="bfloat16"), 2e-3, 0.0),
}
REFUSED = {
    "wrong attention, none": (config("none"), 0.2, 0.0),
    "wrong attention, int8": (config(), 0.2, 5e-4),
    "wrong attention, bfloat16": (config(dtype="bfloat16"), 0.2, 5e-4),
    "wrong attention, nvfp4": (config("nvfp4"), 0.3, 0.01),
    "a forgotten bias, none": (config("none"), 1e-3, 0.0),
    "no number": (config(), float("nan"), 5e-4),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_rounding_explains_is_no_alarm(name):
    made, kl, quantization_kl = ACCEPTED[name]
    World(made, [kl], quantization_kl).check()  # raises ConfigError for an alarm


@pytest.mark.parametrize("name", REFUSED)
def test_different_functions_are_refused_with_both_figures(name):
    made, kl, quantization_kl = REFUSED[name]
    with pytest.raises(ConfigError, match="engine 0 and the learner compute different functions") as raised:
        World(made, [kl], quantization_kl).check()
    text = str(raised.value)
    assert "mean logprob is -2 " in text and "the learner's, with the same weights, -2.5;" in text and "probe.start_max_kl" in text
    assert f"{kl:.3g} nats" in text and "\n" not in text


def test_the_limit_can_be_set():
    World(config("none", start_max_kl=0.5), [0.2]).check()
    with pytest.raises(ConfigError, match=r"explain 1e-06"):
        World(config("none", "bfloat16", start_max_kl=1e-6), [1e-5]).check()


def test_every_engine_is_asked_and_one_that_differs_is_named(caplog):
    caplog.set_level(logging.INFO)
    world = World(config("none", num_engines=3), [1e-9, 1e-9, 0.2])
    with pytest.raises(ConfigError, match="engine 2 and the learner"):
        world.check()
    assert world.probed == [8, 8, 8] and len({request for request, *_ in world.sampled}) == 6
    assert {rest for _, *rest in map(tuple, world.sampled) for rest in [tuple(rest)]} == {(NUM_TOKENS, 1.0, ())}
    assert "engine 0 and learner: 1e-09 nats over 32 tokens, 0.0001 explained" in caplog.text
    many = World(config("none", num_engines=64), [1e-9] * 64)
    many.check()
    assert len(many.sampled) == 2 * MAX_ENGINES
