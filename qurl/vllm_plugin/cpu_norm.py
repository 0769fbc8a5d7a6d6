"""The norm of qurl's engines on the CPU: one pass over the activations.

vLLM's CPU backend expects torch.compile to fuse the operations of a norm and runs them one by one in eager mode; beside INT8 matrix
products they take up to a tenth of a decode step. Its C++ library has the whole norm, which this class calls. (It also has
silu_and_mul, which is slower than torch's two operations.) Compiled engines do not come here: vLLM then takes `forward_native`.

register() replaces the class in the process through vLLM's out-of-tree registry, but an instance behaves as vLLM's own unless
its model was built with qurl's quantization config."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.layernorm import RMSNorm

from qurl.vllm_plugin import NAME
from qurl.vllm_plugin.compat import fused_add_rms_norm, fused_norm_usable, rms_norm


def register() -> None:
    """Call once per process."""
    RMSNorm.register_oot(QurlRMSNorm, name="RMSNorm")


class QurlRMSNorm(RMSNorm):
    """RMSNorm that rounds once, where torch's operations round the normalized value before they multiply by the weight."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config_or_none()
        is_ours = config is not None and config.model_config is not None and config.model_config.quantization == NAME
        self.is_fused = is_ours and self.has_weight and self.variance_size_override is None

    def forward_cpu(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """vLLM's contract: the norm of x, or of x + residual together with that sum."""
        inputs = [x] if residual is None else [x, residual]
        if not self.is_fused or not all(fused_norm_usable(tensor, self.weight) for tensor in inputs):
            return self.forward_native(x, residual)
        if residual is None:
            return rms_norm(x, self.weight, self.variance_epsilon)
        return fused_add_rms_norm(x, residual, self.weight, self.variance_epsilon)
