"""Quantization formats of the rollout weights and what is done with them. Needs torch alone, but for export_checkpoint."""

from collections.abc import Collection, Mapping
from typing import Any

from qurl.quantization.axbxp import AxBxP, PackedAxBxP, check_precision, parse, with_precision
from qurl.quantization.base import QuantizationFormat
from qurl.quantization.changes import changed_codes
from qurl.quantization.error_report import ErrorReport, MatrixError, error_report, matrix_error
from qurl.quantization.export import export_checkpoint
from qurl.quantization.fp8 import Fp8
from qurl.quantization.fp8_block import Fp8Block
from qurl.quantization.group_size import with_group_size
from qurl.quantization.int4 import Int4
from qurl.quantization.int8 import Int8
from qurl.quantization.invariant_scaling import fold_invariant_scaling, scaled_linear_weights
from qurl.quantization.lobcq import Layout, LoBcq, with_codebooks
from qurl.quantization.mxfp4 import MxFp4
from qurl.quantization.nf4 import Nf4
from qurl.quantization.none import Unquantized
from qurl.quantization.nvfp4 import NvFp4
from qurl.quantization.rotation import split_rotation, with_rotation
from qurl.quantization.rounding import rounding_generator
from qurl.quantization.targets import select_targets

LOBCQ_INT6 = "ea5438255a902adb8c968f66ccd7c0eb036851a707f1a7a7fab4ef9ced2070ca"
LOBCQ_INT8 = "be78616fac93c1c31b7791fea86633858e75276e8dda968e3ead3a506b5360d0"
"""Frozen codebooks, by the hash of their content: other ones are another format."""

FORMATS: dict[str, QuantizationFormat] = {
    "none": Unquantized(),
    "int8": Int8(),
    "fp8": Fp8(),
    "fp8_block": Fp8Block(),
    "mxfp4": MxFp4(),
    "nvfp4": NvFp4(),
    "int4": Int4(),
    "nf4": Nf4(),
    "lobcq": LoBcq("lobcq", Layout(), LOBCQ_INT6),
    "lobcq_int8": LoBcq("lobcq_int8", Layout(codeword_bits=8), LOBCQ_INT8),
    "lobcq_w4a16": LoBcq("lobcq_w4a16", Layout(), LOBCQ_INT6, keeps_activations=True),
    "axbxp": AxBxP("axbxp", parse("k2-w2g16-a3g1")),
    "axbxp_k2l2": PackedAxBxP("axbxp_k2l2", parse("k2-w2g16-a4")),
    "axbxp_k1l3": PackedAxBxP("axbxp_k1l3", parse("k1-w3g16-a7")),
}
"""Formats by the name that `quantization.format` takes."""


def resolved_format(
    name: str,
    *,
    codebooks: Any = None,
    rotation: int = 0,
    group_size: int = 0,
    precision: str | Mapping[str, str] | None = None,
    layers: Collection[str] | None = None,
) -> QuantizationFormat:
    """The format that `quantization.format`, `codebooks`, `rotation`, `group_size` and `precision` name.

    layers: its quantized modules; None where they are not known yet, and what names layers is only read. Raises ValueError for an
    unknown name, as with_codebooks, with_group_size, with_rotation and with_precision do, and as the format's check_layers."""
    if name not in FORMATS:
        raise ValueError(f"quantization.format={name!r} is unknown; use one of {', '.join(sorted(FORMATS))}")
    format = with_rotation(with_group_size(with_codebooks(FORMATS[name], codebooks), group_size), rotation)
    if layers is None:
        check_precision(format, precision)
        return format
    format = with_precision(format, precision, layers)
    format.check_layers(layers)
    return format


__all__ = [
    "FORMATS", "ErrorReport", "MatrixError", "QuantizationFormat", "changed_codes", "check_precision", "error_report",
    "export_checkpoint", "fold_invariant_scaling", "matrix_error", "resolved_format", "rounding_generator", "scaled_linear_weights",
    "select_targets", "split_rotation", "with_precision",
]
