"""Quantization formats of the rollout weights and what is done with them. Needs torch alone, but for export_checkpoint."""

from qurl.quantization.base import QuantizationFormat
from qurl.quantization.changes import changed_codes
from qurl.quantization.error_report import ErrorReport, MatrixError, error_report, matrix_error
from qurl.quantization.export import export_checkpoint
from qurl.quantization.fp8 import Fp8
from qurl.quantization.fp8_block import Fp8Block
from qurl.quantization.int8 import Int8
from qurl.quantization.invariant_scaling import fold_invariant_scaling, scaled_linear_weights
from qurl.quantization.mxfp4 import MxFp4
from qurl.quantization.none import Unquantized
from qurl.quantization.rounding import rounding_generator
from qurl.quantization.targets import select_targets

FORMATS: dict[str, QuantizationFormat] = {
    "none": Unquantized(),
    "int8": Int8(),
    "fp8": Fp8(),
    "fp8_block": Fp8Block(),
    "mxfp4": MxFp4(),
}
"""Formats by the name that `quantization.format` takes."""

__all__ = [
    "FORMATS", "ErrorReport", "MatrixError", "QuantizationFormat", "changed_codes", "error_report", "export_checkpoint",
    "fold_invariant_scaling", "matrix_error", "rounding_generator", "scaled_linear_weights", "select_targets",
]
