"""Embeddings on the CPU, without the packed copy that only an output head needs."""

from __future__ import annotations

from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod


class QurlEmbeddingMethod(UnquantizedEmbeddingMethod):
    """vLLM's method, but packing for a matrix product waits until the embedding is used as a head.

    vLLM's CPU backend packs a second copy of every embedding when it is loaded, though most models use only the copy that belongs
    to their (possibly tied) lm_head. Not packing saves the size of the embedding and the time after each weight update."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Forget a copy packed from earlier weights."""
        layer.__dict__.pop("cpu_linear", None)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.device.type == "cpu" and not hasattr(layer, "cpu_linear"):
            super().process_weights_after_loading(layer)
        return super().apply(layer, x, bias)
