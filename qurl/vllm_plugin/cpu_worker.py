"""vLLM's CPU worker with qurl's sampler; `worker_cls` of qurl's engines where there is no GPU."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from qurl.vllm_plugin.cpu_sampler import QurlSampler


class QurlCpuWorker(CPUWorker):
    """Speculative decoding keeps vLLM's sampler."""

    def init_device(self) -> None:
        super().init_device()
        if self.vllm_config.speculative_config is None:
            self.model_runner.sampler = QurlSampler(self.model_runner, logprobs_mode=self.model_config.logprobs_mode)

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        if isinstance(self.model_runner.sampler, QurlSampler) and (kept := self.model_runner.sampler.take_kept()) is not None:
            output.sampling_masks = kept
        return output
