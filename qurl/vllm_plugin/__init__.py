"""The vLLM side of qurl: low-precision linear layers whose weights can be replaced while the engine lives.

    engine_args(format, ignore, precision)  what LLM(), EngineArgs or LLMEngine must be given
    register()                              vLLM's entry point; runs in every vLLM process

Importing this package imports nothing of vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NAME = "qurl"
"""Of the quantization method and of the weight-transfer engine, in vLLM's registries."""


def register() -> None:
    """Make the quantization method, the norm and the weight-transfer engine known to this process; more calls change nothing."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from qurl.vllm_plugin import config, cpu_norm  # noqa: F401  config registers on import
    from qurl.vllm_plugin.compat import has_norm, has_weight_transfer_engine

    if not has_norm():
        cpu_norm.register()
    if not has_weight_transfer_engine(NAME):
        WeightTransferEngineFactory.register_engine(NAME, "qurl.vllm_plugin.transfer", "QurlWeightTransferEngine")


def engine_args(
    format: str, ignore: Sequence[str] = (), precision: str | Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Keyword arguments for vLLM's LLM or EngineArgs: an engine that holds `format` and accepts qurl's weight stream.

    format: key of qurl.quantization.FORMATS. ignore, precision: as in the group quantization. The model may be an ordinary
    checkpoint, which is encoded while it loads. A pattern that matches nothing raises ValueError when the engine starts. Raises
    ValueError for an unknown format or setting."""
    import torch

    arguments = {
        "quantization": NAME,
        "hf_overrides": {"quantization_config": quantization_config(format, ignore, precision=precision)},
        "weight_transfer_config": {"backend": NAME},
    }
    return arguments if torch.cuda.is_available() else arguments | {"worker_cls": "qurl.vllm_plugin.cpu_worker.QurlCpuWorker"}


def quantization_config(
    format: str, ignore: Sequence[str] = (), *, encoded: bool = False, precision: str | Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The `quantization_config` entry of config.json that selects this plugin.

    encoded: the checkpoint already holds wire tensors (codes as "weight", scales by their suffixes) for the quantized modules.
    Raises ValueError for an unknown format or setting."""
    from qurl.quantization import FORMATS, check_precision

    if format not in FORMATS:
        raise ValueError(f"quantization.format={format!r} is unknown; use one of {', '.join(sorted(FORMATS))}")
    check_precision(FORMATS[format], precision)
    given = {} if precision is None else {"precision": precision if isinstance(precision, str) else dict(precision)}
    return {"quant_method": NAME, "format": format, "ignore": list(ignore), "encoded": encoded, **given}
