"""How far encode -> decode moves each weight matrix."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from qurl.quantization.base import QuantizationFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixError:
    """One weight matrix W against its decoded copy V."""

    name: str  # module
    sqnr_db: float  # 10 log10(|W|^2 / |W - V|^2), dB; inf where the copy is exact
    relative_error: float  # |W - V| / |W|, Frobenius norms; 0 where the copy is exact


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorReport:
    """All matrices of a model, in order of name."""

    matrices: list[MatrixError]

    @property
    def worst(self) -> MatrixError:
        """The matrix with the lowest SQNR."""
        return min(self.matrices, key=lambda matrix: matrix.sqnr_db)

    @property
    def sqnr_min_db(self) -> float:
        """SQNR of the worst matrix, dB."""
        return self.worst.sqnr_db


def matrix_error(name: str, weight: Tensor, quantization: QuantizationFormat) -> MatrixError:
    """Error of encode -> decode of a weight [O, I]."""
    format = quantization.of_layer(name)
    return copy_error(name, weight, format.decode(format.encode(weight)))


def copy_error(name: str, weight: Tensor, copy: Tensor) -> MatrixError:
    """Error of a decoded copy of a weight, both [O, I], summed in float64."""
    exact = weight.double()
    noise = float((exact - copy.double()).square().sum())
    if noise == 0.0:
        return MatrixError(name=name, sqnr_db=math.inf, relative_error=0.0)
    noise_to_signal = noise / float(exact.square().sum())
    return MatrixError(name=name, sqnr_db=-10.0 * math.log10(noise_to_signal), relative_error=math.sqrt(noise_to_signal))


def error_report(state_dict: Mapping[str, Tensor], quantization: QuantizationFormat, targets: Collection[str]) -> ErrorReport:
    """Errors of the modules `targets`, whose weights are state_dict[f"{module}.weight"].

    Raises ValueError where there is no target or a weight is missing."""
    missing = [name for name in sorted(targets) if f"{name}.weight" not in state_dict]
    if missing or not targets:
        raise ValueError(f"no weights of {missing[:4]} in the state dict" if targets else "no modules to report on")
    return ErrorReport(matrices=[matrix_error(name, state_dict[f"{name}.weight"], quantization) for name in sorted(targets)])
