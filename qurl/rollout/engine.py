"""One vLLM engine with a thread of its own.

vLLM's `LLMEngine` runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0). `AsyncLLM` would always add two processes: ten seconds
more to start, and another copy of every weight bucket. Here "pause" is simply not to call `step()`. One thread owns the engine;
everybody else hands it work through a queue and gets a future. Between two steps it takes what is queued, so requests join the
running batch at once (continuous batching).

Engine thread: consumes queued calls and sampled tokens, produces futures, waits for a call when nothing is running, woken by the
queue."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from qurl.actors import portable
from qurl.config import ModelConfig, QuantizationConfig, RolloutConfig
from qurl.errors import one_line
from qurl.kept_tokens import pack_sets
from qurl.rollout.request import GenerationRequest
from qurl.types import Rollout, TensorRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStatus:
    """Answered at once, even while the engine thread hangs."""

    engine_id: str
    pid: int
    num_running: int  # samples under way
    num_tokens: int  # sampled since the start
    busy_s: float  # seconds that the engine thread's current step or call has lasted; 0 where it waits for one
    weight_version: int | None  # None: not ready to sample
    waiting_for: list[str]  # request ids under way


class EngineFailed(RuntimeError):
    """A step of an engine raised: whatever it holds is not to be relied on, and it answers nothing any more."""

    def __init__(self, cause: str, engine_id: str, host: str):
        super().__init__(cause, engine_id, host)  # all three, so that it survives pickling
        self.cause_text = cause  # class and text of what the step raised

    def __str__(self) -> str:
        cause, engine_id, host = self.args
        return f"engine {engine_id} on {host}: {cause}"


@dataclass(kw_only=True, slots=True)
class _Pending:
    """A request under way and the samples that are still missing."""

    request: GenerationRequest
    future: Future[list[Rollout]]
    missing: int
    rollouts: dict[int, Rollout] = field(default_factory=dict)


class RolloutEngine:
    """Samples from low-precision weights that arrive through the weight stream; samples nothing before the first commit.

    With load_weights it samples from the checkpoint at once, as version 0."""

    def __init__(
        self,
        model: ModelConfig,
        rollout: RolloutConfig,
        quantization: QuantizationConfig,
        *,
        engine_id: str,
        max_model_len: int,
        seed: int,
        load_weights: bool = False,
    ):
        self.engine_id = engine_id
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._pending: dict[str, _Pending] = {}
        self._samples: dict[str, tuple[str, int]] = {}  # vLLM request id -> (request id, sample index)
        self._version: int | None = None
        self._update_open = False
        self._num_tokens = 0
        self._num_requests = 0
        self._busy_since: float | None = None
        self._stopping = False
        started: Future[None] = Future()
        arguments = (started, model, rollout, quantization, max_model_len, seed, load_weights)
        self._thread = threading.Thread(target=self._run, args=arguments, name=f"engine-{engine_id}", daemon=True)
        self._thread.start()
        started.result()

    # ---- called from any thread -------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Future[list[Rollout]]]:
        """For each request all its samples, in sample order. A future fails with what vLLM raises where it refuses the prompt, and
        with EngineFailed where a step raises.

        Requests given together join the batch in the same step: what is computed together, and with it the last bit of a logprob,
        then does not depend on how fast they were handed over."""
        futures: list[Future[list[Rollout]]] = [Future() for _ in requests]
        call = self._call(lambda: self._add_all(requests, futures))
        call.add_done_callback(lambda done: _fail(futures, done.exception()))  # of an engine that has failed before
        return futures

    def abort_all(self) -> Future[None]:
        """Forget everything under way; the futures are cancelled."""
        return self._call(self._abort_all)

    def begin_weight_update(self, version: int) -> Future[None]:
        """Stop sampling until the commit; requests under way keep their tokens and go on with the new weights."""
        return self._call(lambda: self._begin_weight_update(version))

    def receive_bucket(self, bucket: Any) -> Future[None]:
        """Verify and install one bucket (qurl.sync.WireBucket)."""
        return self._call(lambda: self._update_weights({"version": bucket.version, "bucket": bucket}))

    def commit_weight_update(self, version: int, manifest: list[TensorRecord]) -> Future[float]:
        """Check completeness, reset the prefix cache, take up sampling. Seconds spent verifying and installing."""
        return self._call(lambda: self._commit_weight_update(version, manifest))

    def set_precision(self, precision: str | Mapping[str, str] | None) -> Future[float]:
        """Multiply other blocks of the codes, as quantization.precision says for quantization=axbxp; samples nothing until the next
        commit. Seconds that it took."""
        return self._call(lambda: self._set_precision(precision))

    def read_back(self, module_names: list[str]) -> Future[dict[str, Any]]:
        """Decoded float32 weights that the engine really holds, for the audit and for tests."""
        from qurl.vllm_plugin.transfer import read_back

        return self._call(lambda: self._engine.collective_rpc(read_back, args=(module_names,))[0])

    def status(self) -> EngineStatus:
        """Never blocks on the engine thread."""
        busy_since = self._busy_since
        return EngineStatus(
            engine_id=self.engine_id,
            pid=os.getpid(),
            num_running=len(self._samples),
            num_tokens=self._num_tokens,
            busy_s=0.0 if busy_since is None else time.monotonic() - busy_since,
            weight_version=self._version,
            waiting_for=list(self._pending),
        )

    def close(self) -> None:
        """End the engine thread."""
        self._stopping = True
        self._call(lambda: None)
        self._thread.join(timeout=10)

    def _call(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.put((function, future))
        return future

    # ---- the engine thread ------------------------------------------------------------------------------------------

    def _run(
        self, started: Future[None], model, rollout, quantization, max_model_len: int, seed: int, load_weights: bool
    ) -> None:
        from qurl.rollout.vllm_engine import build_engine

        try:
            self._engine, self._sampling_params = build_engine(
                model, rollout, quantization, max_model_len=max_model_len, seed=seed, load_weights=load_weights
            )
            if load_weights:
                self._engine.set_weight_version("0")
                self._version = 0
        except BaseException as error:  # whatever vLLM raises belongs to the caller of __init__
            started.set_exception(error)
            return
        started.set_result(None)
        while not self._stopping:
            self._take_calls()
            if self._version is not None and self._samples:
                self._busy_since = time.monotonic()
                try:
                    self._step()
                except BaseException as error:  # trust boundary: the thread must not end in silence, whatever a kernel raises
                    self._serve_failure(error)

    def _serve_failure(self, error: BaseException) -> None:
        """Fail everything under way and every later call with what the step raised, until the engine is closed."""
        logger.error("engine %s: a step raised", self.engine_id, exc_info=error)
        text, name = one_line(portable(_as_exception(error))), type(error).__name__
        cause = text if text.startswith(name) else f"{name}: {text}"
        failure = EngineFailed(cause, self.engine_id, socket.gethostname())
        self._version, self._busy_since = None, None
        futures = [pending.future for pending in self._pending.values()]
        self._pending.clear()
        self._samples.clear()
        _fail(futures, failure)
        while not self._stopping:
            _, future = self._calls.get()
            future.set_exception(failure)

    def _take_calls(self) -> None:
        """Run queued calls; waits for one where there is nothing to sample."""
        idle = self._version is None or not self._samples
        while True:
            self._busy_since = None
            try:
                function, future = self._calls.get(block=idle)
            except queue.Empty:
                return
            self._busy_since = time.monotonic()
            try:
                future.set_result(function())
            except BaseException as error:  # a call's failure belongs to its caller; the thread lives on
                future.set_exception(_as_exception(error))
            idle = False

    def _step(self) -> None:
        for output in self._engine.step():
            if output.finished:
                self._finish_sample(output)

    def _add_all(self, requests: Sequence[GenerationRequest], futures: Sequence[Future[list[Rollout]]]) -> None:
        for request, future in zip(requests, futures, strict=True):
            self._add(request, future)

    def _add(self, request: GenerationRequest, future: Future[list[Rollout]]) -> None:
        self._pending[request.request_id] = _Pending(request=request, future=future, missing=len(request.seeds))
        try:
            for index, seed in enumerate(request.seeds):
                self._num_requests += 1
                name = str(self._num_requests)
                params = self._sampling_params(request.sampling, seed)
                self._engine.add_request(name, {"prompt_token_ids": request.token_ids}, params)
                self._samples[name] = (request.request_id, index)
        except Exception as error:  # the refusal of one prompt belongs to whoever asked for it
            self._drop(request.request_id)
            future.set_exception(error)

    def _drop(self, request_id: str) -> None:
        names = [name for name, (owner, _) in self._samples.items() if owner == request_id]
        self._engine.abort_request(names)
        for name in names:
            del self._samples[name]
        self._pending.pop(request_id, None)

    def _abort_all(self) -> None:
        for request_id in list(self._pending):
            future = self._pending[request_id].future
            self._drop(request_id)
            future.cancel()

    def _finish_sample(self, output: Any) -> None:
        request_id, index = self._samples.pop(output.request_id)
        pending = self._pending[request_id]
        completion = output.outputs[0]
        token_ids = list(completion.token_ids)
        self._num_tokens += len(token_ids)
        versions = [int(span.version) for span in completion.weight_versions or () for _ in range(span.start, span.end)]
        logprobs = list(completion.logprobs.logprobs)
        assert len(versions) == len(token_ids) == len(logprobs), "vLLM labels and scores every token"
        kept, vocab_size = None, self._engine.model_config.get_vocab_size()
        if pending.request.sampling.returns_kept_tokens_of(vocab_size):
            sets = [] if completion.sampling_mask is None else completion.sampling_mask.token_ids
            assert len(sets) == len(token_ids), "the sampler says of every token what was left to draw from"
            kept = pack_sets(token_ids, sets, vocab_size)
        pending.rollouts[index] = Rollout(
            sample_index=index,
            token_ids=token_ids,
            rollout_logprobs=logprobs,
            weight_versions=versions,
            finish_reason="length" if completion.finish_reason == "length" else "stop",
            text="",
            engine_id=self.engine_id,
            seed=pending.request.seeds[index],
            kept_tokens=kept,
        )
        pending.missing -= 1
        if pending.missing == 0:
            del self._pending[request_id]
            pending.future.set_result([pending.rollouts[i] for i in range(len(pending.request.seeds))])

    def _begin_weight_update(self, version: int) -> None:
        self._version = None
        if self._update_open:  # its sender was lost before the commit
            self._engine.collective_rpc("finish_weight_update")
        self._engine.collective_rpc("start_weight_update")
        self._update_open = True

    def _update_weights(self, message: dict[str, Any]) -> None:
        try:
            self._engine.collective_rpc("update_weights", kwargs={"update_info": message})
        except Exception:
            self._update_open = False  # vLLM closes an update that fails here
            raise

    def _commit_weight_update(self, version: int, manifest: list[TensorRecord]) -> float:
        from qurl.vllm_plugin.transfer import install_report

        self._update_weights({"version": version, "manifest": manifest})
        self._engine.collective_rpc("finish_weight_update")
        self._update_open = False
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.set_weight_version(str(version))
        self._version = version
        return max(report.install_s for report in self._engine.collective_rpc(install_report))

    def _set_precision(self, precision: str | Mapping[str, str] | None) -> float:
        from qurl.vllm_plugin.axbxp import switch_precision

        self._version = None  # the weights are those of a version that was sampled with other blocks
        return switch_precision(self._engine, precision)


def _as_exception(error: BaseException) -> Exception:
    """An error that a future can carry to another thread without ending it, as SystemExit would."""
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}".rstrip(": "))


def _fail(futures: Sequence[Future[Any]], error: BaseException | None) -> None:
    """Give the error, where there is one, to every future that is still waited for."""
    for future in futures:
        if error is not None and not future.done():
            future.set_exception(error)
