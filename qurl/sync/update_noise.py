"""How large an update is beside the quantization error that the rollout policy sees it through."""

from __future__ import annotations

import torch
from torch import Tensor


class UpdateNoise:
    """|W_t - W_(t-1)| / |W_t - decode(encode(W_t))| of each weight matrix, Frobenius norms.

    Below 1 a single update is smaller than the error of the copy (QuRL, arXiv:2602.13953, eq. 10). Keeps the previous weights in
    host memory, as float32. Weights are those that are sent: a bfloat16 learner's move only where they cross a bfloat16 step."""

    def __init__(self) -> None:
        self._previous: dict[str, Tensor] = {}

    def ratio(self, module: str, weight: Tensor, decoded: Tensor) -> float | None:
        """Of the update since the last call for `module`; None in the first and for an exact copy. weight: [O, I] float32."""
        on_host = weight.detach().cpu()
        previous = self._previous.get(module)
        if previous is None or previous.shape != on_host.shape:
            self._previous[module] = on_host.clone()
            return None
        update = float(torch.linalg.vector_norm(on_host - previous))
        noise = float(torch.linalg.vector_norm(weight - decoded.to(weight.device)))
        previous.copy_(on_host)
        return update / noise if noise else None
