"""The engine's thread, over a fake of vLLM's LLMEngine."""

import concurrent.futures
import pickle

import pytest

from qurl.config import ModelConfig, QuantizationConfig, RolloutConfig
from qurl.rollout import vllm_engine
from qurl.rollout.engine import EngineFailed, RolloutEngine
from qurl.rollout.request import GenerationRequest, Sampling

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=4, stop_token_ids=(1,))
LIMIT_S = 10.0  # far below engine_timeout_s: what fails must fail at once


class FakeVllm:
    """Raises `error` at its first step."""

    def __init__(self, error):
        self.error = error

    def set_weight_version(self, version):
        pass

    def add_request(self, name, prompt, params):
        if not prompt["prompt_token_ids"]:
            raise ValueError("the prompt is empty")

    def abort_request(self, names):
        pass

    def step(self):
        raise self.error


def engine(monkeypatch, error):
    monkeypatch.setattr(vllm_engine, "build_engine", lambda *args, **kwargs: (FakeVllm(error), lambda sampling, seed: None))
    return RolloutEngine(
        ModelConfig(path="x"), RolloutConfig(), QuantizationConfig(), engine_id="3", max_model_len=8, seed=0, load_weights=True
    )


def request(name, token_ids=(2, 3)):
    return GenerationRequest(request_id=name, token_ids=list(token_ids), seeds=[1, 2], sampling=SAMPLING)


class KernelPanic(BaseException):
    """What a library in Rust raises is no Exception."""


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("no kernel for heads of 16"), "RuntimeError: no kernel for heads of 16"),
        (KeyError("attn"), "KeyError: 'attn'"),
        (KernelPanic("index out of range"), "KernelPanic: index out of range"),
    ],
)
def test_a_step_that_raises_fails_what_is_under_way_and_what_comes_after_at_once(monkeypatch, error, text):
    started = engine(monkeypatch, error)
    futures = started.generate([request("a"), request("b")])
    for future in futures:
        with pytest.raises(EngineFailed) as raised:
            future.result(timeout=LIMIT_S)
        assert str(raised.value).startswith("engine 3 on ") and str(raised.value).endswith(f": {text}")
    status = started.status()
    assert (status.num_running, status.busy_s, status.weight_version, status.waiting_for) == (0, 0.0, None, [])
    [later] = started.generate([request("c")])
    for call in (later, started.begin_weight_update(1), started.abort_all()):
        with pytest.raises(EngineFailed):
            call.result(timeout=LIMIT_S)
    started.close()
    assert not started._thread.is_alive()


def test_a_prompt_that_is_refused_fails_alone(monkeypatch):
    started = engine(monkeypatch, RuntimeError("unused"))
    started._step = lambda: None
    refused, running = started.generate([request("a", ()), request("b")])
    with pytest.raises(ValueError, match="the prompt is empty"):
        refused.result(timeout=LIMIT_S)
    with pytest.raises(concurrent.futures.TimeoutError):
        running.result(timeout=0.01)
    started.close()


def test_the_failure_survives_the_way_to_the_driver():
    failure = pickle.loads(pickle.dumps(EngineFailed("KeyError: 'attn'", "3", "host")))
    assert str(failure) == "engine 3 on host: KeyError: 'attn'" and failure.cause_text == "KeyError: 'attn'"
