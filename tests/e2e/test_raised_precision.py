"""guard.action=raise_precision on an engine that lives on: trainer's weights, the pool and vLLM's engine, all in this process."""

import asyncio
from concurrent.futures import Future

import pytest
import ray
import torch
from safetensors.torch import load_file

from qurl.config import GuardAction, ModelConfig, QuantizationConfig, RolloutConfig, SyncConfig
from qurl.quantization import FORMATS, with_precision
from qurl.rollout.engine import RolloutEngine
from qurl.rollout.pool import RolloutPool
from qurl.rollout.request import GenerationRequest, Sampling
from qurl.sync import WeightSender
from qurl.trainer.guard import fallback
from qurl.trainer.weights import PublishedWeights

pytestmark = pytest.mark.e2e

CONFIGURED = QuantizationConfig(format="axbxp")


class Call:
    """What .remote() of a handle returns."""

    def __init__(self, result):
        self._result = result

    def future(self):
        return self._result

    def __await__(self):
        return asyncio.wrap_future(self._result).__await__()


class Handle:
    """Of an engine in this process, as Ray gives them."""

    def __init__(self, engine):
        for name in ("begin_weight_update", "receive_bucket", "commit_weight_update", "read_back", "set_precision"):
            setattr(self, name, Method(getattr(engine, name)))
        self.start = self.status = Method(lambda: done(engine.status()))


class Method:
    def __init__(self, function):
        self.remote = lambda *args: Call(function(*args))


def done(value):
    future = Future()
    future.set_result(value)
    return future


class Learner:
    """The sender over fixed weights, and a note of how audits went."""

    def __init__(self, weights):
        self.weights = weights
        self.targets = frozenset(name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight"))
        config = SyncConfig(transport="shared_memory", track_changes=True, delta=True)
        self.sender = WeightSender(config, FORMATS["axbxp"], self.targets, torch.float32, 0, 1)

    async def send_weights(self, version, engines, full=False):
        self.report = await asyncio.to_thread(self.sender.send, version, iter(self.weights.items()), engines, full)
        return self.report

    async def set_fallback(self, quantization):
        found = None if quantization is None else with_precision(FORMATS[quantization.format], quantization.precision, self.targets)
        self.sender.set_fallback(found)

    async def decoded_weights(self, start, count):
        return {name: self.sender.decoded(name, self.weights[f"{name}.weight"]) for name in sorted(self.targets)}


def test_a_live_engine_raises_its_precision_goes_back_and_passes_every_audit(workspace, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr(ray, "kill", lambda handle: pytest.fail("an engine was lost"))
    model, rollout = ModelConfig(path=str(workspace / "tiny")), RolloutConfig(engine_args={"dtype": "float32"})
    engines = []

    def starter(quantization):
        def start(engine_id):
            engines.append(RolloutEngine(model, rollout, quantization, engine_id=engine_id, max_model_len=64, seed=0))
            return Handle(engines[-1])

        return start

    async def logprobs(name):
        sampling = Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=16, stop_token_ids=())
        request = GenerationRequest(request_id=name, token_ids=[5, 6, 7, 8], seeds=[0], sampling=sampling)
        [future] = engines[0].generate([request])
        [found] = await asyncio.wrap_future(future)
        return found

    async def scenario():
        learner = Learner(load_file(workspace / "tiny" / "model.safetensors"))
        pool = RolloutPool(rollout, starter(CONFIGURED), run_seed=0, decode=str)
        raised = fallback(GuardAction.raise_precision, CONFIGURED)
        weights = PublishedWeights(SyncConfig(audit_layers=1), learner, pool, starter, CONFIGURED, raised)
        await pool.start()
        await weights.publish(0)
        found = [await logprobs("0")]
        for version, fallen_back in ((1, True), (2, False)):
            await weights.switch(fallen_back)
            assert engines[0].status().weight_version is None  # it samples nothing before the weights are there
            await weights.publish(version)
            assert learner.report.num_changed_codes == learner.report.num_bytes == 0  # the wire is the same
            assert len(pool.handles) == 1 and pool.num_restarts == 0
            found.append(await logprobs(str(version)))
        return found

    configured, raised, returned = asyncio.run(scenario())
    assert len(engines) == 1
    assert configured.rollout_logprobs == returned.rollout_logprobs != raised.rollout_logprobs
    assert [set(each.weight_versions) for each in (configured, raised, returned)] == [{0}, {1}, {2}]
    engines[0].close()
