"""`quantization.precision`: which layer has which precision."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from qurl.quantization.axbxp.format import AxBxP
from qurl.quantization.axbxp.packed import PackedAxBxP
from qurl.quantization.axbxp.precision import Precision, parse
from qurl.quantization.base import QuantizationFormat
from qurl.quantization.targets import matches_pattern

KEY = "quantization.precision"


def check_precision(format: QuantizationFormat, precision: str | Mapping[str, str] | None) -> None:
    """Raises ValueError where the format takes no precision or a setting is none; see qurl.quantization.axbxp.precision."""
    if precision is None:
        return
    if not isinstance(format, AxBxP) or isinstance(format, PackedAxBxP):
        raise ValueError(f"{KEY} needs quantization=axbxp, and {format.name} is given; remove it or change the format")
    if not isinstance(precision, str | Mapping) or not precision:
        raise ValueError(f"{KEY}={precision!r} is neither a setting such as k2-w2g16-a3g1 nor a mapping of patterns to settings")
    for setting in [precision] if isinstance(precision, str) else precision.values():
        parse(setting)


def with_precision(
    format: QuantizationFormat, precision: str | Mapping[str, str] | None, layers: Collection[str]
) -> QuantizationFormat:
    """The format, with the precision of each of `layers`, its quantized modules; see QuantizationFormat.of_layer.

    precision: a setting for all; or pattern -> setting, of which the first that matches a layer counts, and layers that none
    matches have the format's own. Patterns are those of qurl.quantization.select_targets. None: the format as it is. Raises
    ValueError for a pattern that is no regex or matches nothing, and as check_precision does."""
    check_precision(format, precision)
    if precision is None or not isinstance(format, AxBxP):
        return format
    if isinstance(precision, str):
        return AxBxP(format.name, parse(precision))
    return AxBxP(format.name, format.precision, _assigned(precision, layers))


def _assigned(precision: Mapping[str, str], layers: Collection[str]) -> dict[str, Precision]:
    assigned: dict[str, Precision] = {}
    for pattern, setting in precision.items():
        matches = [name for name in layers if matches_pattern(name, pattern, KEY)]
        if not matches:
            example = next(iter(layers), "none")
            raise ValueError(
                f"{KEY}={pattern!r} matches none of the {len(layers)} quantized layers (one is {example!r}); use a module name, "
                "its last components, or 're:' and a regex for the whole name"
            )
        assigned = {**dict.fromkeys(matches, parse(setting)), **assigned}
    return assigned
