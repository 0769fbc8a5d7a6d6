"""The vLLM side of qurl: low-precision linear layers whose weights can be replaced while the engine lives.

    engine_args(format, ignore, ...)  what LLM(), EngineArgs or LLMEngine must be given
    register()                        vLLM's entry point; runs in every vLLM process

Importing this package imports nothing of vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch, which --help does not wait for
    from qurl.quantization import QuantizationFormat

NAME = "qurl"
"""Of the quantization method and of the weight-transfer engine, in vLLM's registries."""

CHECKPOINT_VERSION = 1
"""Of encoded checkpoints: what their tensors are called and mean."""

ROTATED_VERSION = 2
"""Of those with a rotation: who knows none would multiply rotated weights with activations that are not."""

GROUPED_VERSION = 3
"""Of those with a group size that is not the format's own."""


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
    format: str,
    ignore: Sequence[str] = (),
    precision: str | Mapping[str, str] | None = None,
    codebooks: Mapping[str, Any] | None = None,
    rotation: int = 0,
    group_size: int = 0,
) -> dict[str, Any]:
    """Keyword arguments for vLLM's LLM or EngineArgs: an engine that holds `format` and accepts qurl's weight stream.

    format: key of qurl.quantization.FORMATS. ignore, precision, rotation, group_size: as in the group quantization. codebooks: the
    content of a file of quantization.codebooks. The model may be an ordinary checkpoint, which is encoded while it loads. A pattern
    that matches nothing raises ValueError when the engine starts. Raises ValueError as qurl.quantization.resolved_format does."""
    import torch

    config = quantization_config(format, ignore, precision=precision, codebooks=codebooks, rotation=rotation, group_size=group_size)
    arguments = {
        "quantization": NAME,
        "hf_overrides": {"quantization_config": config},
        "weight_transfer_config": {"backend": NAME},
    }
    return arguments if torch.cuda.is_available() else arguments | {"worker_cls": "qurl.vllm_plugin.cpu_worker.QurlCpuWorker"}


def quantization_config(
    format: str,
    ignore: Sequence[str] = (),
    *,
    encoded: bool = False,
    precision: str | Mapping[str, str] | None = None,
    codebooks: Mapping[str, Any] | None = None,
    rotation: int = 0,
    group_size: int = 0,
) -> dict[str, Any]:
    """The `quantization_config` entry of config.json that selects this plugin.

    encoded: the checkpoint already holds wire tensors (codes as "weight", scales by their suffixes) for the quantized modules;
    the entry then also says by which version of their layout and, where the format has codebooks, by the SHA-256 of which.
    codebooks: the content of a file of quantization.codebooks, which the entry then holds, so that it needs no file. Raises
    ValueError as qurl.quantization.resolved_format does."""
    from qurl.quantization import resolved_format

    found = resolved_format(format, codebooks=codebooks, precision=precision, rotation=rotation, group_size=group_size)
    config: dict[str, Any] = {"quant_method": NAME, "format": format, "ignore": list(ignore), "encoded": encoded}
    if precision is not None:
        config["precision"] = precision if isinstance(precision, str) else dict(precision)
    if rotation:
        config["rotation"] = rotation
    if group_size:
        config["group_size"] = group_size
    config |= _own_codebooks(found)
    return config | _encoding(found) if encoded else config


def format_of(config: Mapping[str, Any]) -> QuantizationFormat:
    """Of a `quantization_config` that quantization_config made. Raises ValueError as it does, and as check_encoding."""
    from qurl.quantization import resolved_format

    codebooks = config.get("codebooks")
    own = None if isinstance(codebooks, str) else codebooks  # a hash is one of the package's
    format = resolved_format(
        str(config.get("format")), codebooks=own, precision=config.get("precision"), rotation=config.get("rotation", 0),
        group_size=config.get("group_size", 0),
    )
    if config.get("encoded", False):
        check_encoding(config, format)
    return format


def check_encoding(config: Mapping[str, Any], format: QuantizationFormat) -> None:
    """Raises ValueError where the tensors of an encoded checkpoint, by its `quantization_config`, mean other numbers here."""
    expected = _encoding(format)
    for key, words in (("version", "another version"), ("codebooks", "other codebooks")):
        if config.get(key) != expected.get(key):
            raise ValueError(
                f"quantization_config.{key}={config.get(key)!r}: the checkpoint was encoded with {words} than this qurl "
                f"reads, {expected.get(key)!r}; quantize the model again with `qurl quantize`, or install the qurl that wrote it"
            )


def _encoding(format: QuantizationFormat) -> dict[str, Any]:
    sha256 = format.codebooks_sha256
    version = ROTATED_VERSION if format.rotation else CHECKPOINT_VERSION
    version = GROUPED_VERSION if format.group_size else version
    return {"version": version} | ({} if sha256 is None else {"codebooks": sha256}) | _own_codebooks(format)


def _own_codebooks(format: QuantizationFormat) -> dict[str, Any]:
    """Their content, under the key that holds the hash of the package's."""
    from qurl.quantization.lobcq import LoBcq

    own = format.own_codebooks if isinstance(format, LoBcq) else None
    return {} if own is None else {"codebooks": own.content}
