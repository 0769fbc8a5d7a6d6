"""vLLM's quantization config for every format of qurl: which layer gets which method."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from qurl.quantization import FORMATS, select_targets, with_precision
from qurl.quantization.base import QuantizationFormat
from qurl.quantization.targets import matches_pattern
from qurl.vllm_plugin import NAME, format_of
from qurl.vllm_plugin.compat import stacked_modules
from qurl.vllm_plugin.embedding import QurlEmbeddingMethod
from qurl.vllm_plugin.linear import QurlLinearMethod

if TYPE_CHECKING:
    from collections.abc import Mapping


@register_quantization_config(NAME)
class QurlConfig(QuantizationConfig):
    """One format for all linear layers but the ignored ones; embeddings and the output head stay in full precision.

    Names of patterns are Hugging Face's. What matches is known only when the whole model is built, so each layer asks
    `format_of` when its weights have been loaded."""

    def __init__(
        self, format: QuantizationFormat, ignore: list[str], encoded: bool, precision: str | Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.format = format
        self.ignore = ignore
        self.encoded = encoded
        self.precision = precision
        self._linear_names: list[str] = []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QurlConfig:
        """From the `quantization_config` of a config.json (see qurl.vllm_plugin.quantization_config). Raises ValueError as
        format_of does, before any weight is read."""
        encoded = bool(config.get("encoded", False))
        return cls(format_of(config), list(config.get("ignore", ())), encoded, config.get("precision"))

    def get_name(self) -> Any:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """QurlLinearMethod for linear layers, an embedding that is not packed as a head without need, else vLLM's default."""
        if isinstance(layer, LinearBase):
            names = self.hf_names(prefix)
            self._linear_names += names
            return QurlLinearMethod(self, names)
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            return QurlEmbeddingMethod()
        return None

    def hf_names(self, prefix: str) -> list[str]:
        """The Hugging Face modules that vLLM fuses into the module `prefix`, in the order of their rows."""
        parent, dot, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf) or self._stacked.get(leaf, [leaf])
        return [f"{parent}{dot}{part}" for part in parts]

    def is_ignored(self, names: list[str]) -> bool:
        """Whether a pattern matches a part of a fused module, which then is in full precision or, by format_of, an error."""
        return any(matches_pattern(name, pattern, "quantization.ignore") for name in names for pattern in self.ignore)

    def format_of(self, names: list[str]) -> QuantizationFormat:
        """The format of a fused module. Raises ValueError where only some of its parts are ignored, and as select_targets,
        with_precision and the format's check_layers and of_layers do."""
        chosen = [name in self._targets for name in names]
        if any(chosen) and not all(chosen):
            ignored = [name for name, is_target in zip(names, chosen, strict=True) if not is_target]
            raise ValueError(
                f"quantization.ignore={self.ignore} keeps {', '.join(ignored)} in full precision, but the engine runs "
                f"{', '.join(names)} as one matrix; ignore all of them or none"
            )
        if not all(chosen):
            return FORMATS["none"]
        return self._started_with.of_layers(names)

    def with_precision(self, precision: str | Mapping[str, str] | None) -> QuantizationFormat:
        """The format with a quantization.precision for this model. ValueError as qurl.quantization.with_precision."""
        return with_precision(self.format, precision, sorted(self._targets))

    @cached_property
    def _stacked(self) -> dict[str, list[str]]:
        current = get_current_vllm_config_or_none()
        return {} if current is None or current.model_config is None else stacked_modules(current.model_config)

    @cached_property
    def _started_with(self) -> QuantizationFormat:
        format = self.with_precision(self.precision)
        format.check_layers(sorted(self._targets))
        return format

    @cached_property
    def _targets(self) -> frozenset[str]:
        if self.format.name == "none":
            return frozenset()
        return select_targets(self._linear_names, self.ignore)
