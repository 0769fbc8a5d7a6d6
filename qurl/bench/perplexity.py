"""What formats do to the perplexity of a model on held-out text, beside the errors that they make in its operands.

Every format sees the same documents, so its increase over full precision, and the ratio of two increases, have standard errors of
paired differences. Losses are kept per document in a folder; the same call goes on where an earlier one was killed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qurl.config.codebooks_file import resolved_codebooks
from qurl.config.precision_file import resolved_precision
from qurl.errors import one_line
from qurl.ptq.evaluation import Text, inputs_of, load_float32, quantized_in_memory
from qurl.ptq.perplexity import DocumentLoss, decoded_activations
from qurl.ptq.statistics import divergence, increase, perplexity, ratio
from qurl.quantization import FORMATS, QuantizationFormat, resolved_format, select_targets, split_rotation
from qurl.quantization.axbxp import AxBxP
from qurl.quantization.error_report import copy_error
from qurl.quantization.lobcq import LoBcq

BASELINE = "none"
NUM_ERROR_DOCUMENTS = 8
"""Whose activations are rounded to find the error of a format's rule for them."""

Progress = Callable[[str, int, int], None]  # (format, done, total) documents


class Operands(Enum):
    """What is quantized."""

    both = "both"
    weights = "weights"
    activations = "activations"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """Of two formats."""

    value: float
    standard_error: float  # over documents


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityRow:
    """One format."""

    format: str
    bits_per_weight: float
    weight_nmse: float  # |W - decoded|^2 / |W|^2, mean over matrices
    activation_nmse: float  # the same of the inputs of these matrices
    perplexity: float
    increase: float  # over full precision
    standard_error: float  # of the increase, over documents
    divergence: float  # KL(full precision || format) of the next token, nats
    increase_ratio: Ratio | None  # to that of the format that rows are compared with; None where there is none
    divergence_ratio: Ratio | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Unmeasured:
    """A format that could not be measured on the model."""

    format: str
    reason: str


def run_perplexity_bench(
    model: Path,
    text: Text,
    formats: Sequence[str],
    out: Path,
    *,
    operands: Operands = Operands.both,
    relative_to: str | None = None,
    ignore: Sequence[str] = (),
    progress: Progress = lambda format, done, total: None,
    finished: Callable[[PerplexityRow | Unmeasured], None] = lambda row: None,
) -> list[PerplexityRow]:
    """A row per format, full precision first whether named or not; out: the folder of losses, and of the rows as JSON.

    finished: called with each row as soon as there is one. The format that others are compared with is the second. The file of
    rows is written anew after each, so that a killed command leaves those that it had. A format that does not fit the model, or
    for which memory does not last, is left out and the others go on.

    formats: keys of FORMATS, those of LO-BCQ also with a file of codebooks, as lobcq:FILE, and axbxp with a precision, as
    axbxp:SETTING or axbxp:FILE, and int4 and nf4 with a group size, as int4:64; behind that a rotation, as nvfp4@16 or
    lobcq:FILE@16. ignore: as quantization.ignore. relative_to: one of the formats. Raises ValueError for a format that does not
    exist, one of those compared with that does not fit the model, and where none fits."""
    full_precision = load_float32(model)
    linears = {name: module for name, module in full_precision.named_modules() if isinstance(module, nn.Linear)}
    targets = sorted(select_targets(list(linears), ignore))
    quantizations = _resolved(formats, targets)
    relative_to = relative_to and _label(relative_to)
    _check(list(quantizations), relative_to)
    for name, reason in _misfits(quantizations, {target: linears[target].in_features for target in targets}).items():
        del quantizations[name]
        if name == relative_to or len(quantizations) == 1:
            raise ValueError(reason)
        finished(Unmeasured(format=name, reason=reason))
    rows: list[PerplexityRow] = []
    losses: dict[str, list[DocumentLoss]] = {}
    errors: dict[str, _Errors] = {}
    inputs = inputs_of(full_precision, text.documents[:NUM_ERROR_DOCUMENTS], targets)
    weights = {target: linears[target].weight for target in targets}
    first, order = (BASELINE, relative_to), list(quantizations)
    for name, quantization in sorted(quantizations.items(), key=lambda item: item[0] not in first):
        replace = None if name == BASELINE else quantized_in_memory(
            quantization, targets, weights=operands is not Operands.activations, activations=operands is not Operands.weights
        )  # fmt: skip
        question: dict[str, Any] = {"format": name, "ignore": list(ignore), "operands": operands.value}
        question["codebooks"] = quantization.codebooks_sha256
        if isinstance(quantization, AxBxP):
            question["precision"] = {target: str(quantization.of_layer(target).precision) for target in targets}
        path = out / operands.value / (re.sub(r"[^\w.-]", "_", name) + ".jsonl")
        try:
            losses[name] = text.losses(path, question, replace, partial(_report, progress, name, len(text.documents)))
            errors[name] = _errors(quantization, weights, inputs)
        except (torch.OutOfMemoryError, MemoryError) as error:
            if name in first:
                raise
            losses.pop(name, None)
            finished(Unmeasured(format=name, reason=one_line(error)))
            continue
        if relative_to is not None and relative_to not in losses:
            continue  # the next one is what full precision is compared with
        for waiting in [name for name in losses if name not in {row.format for row in rows}]:
            rows.append(_row(waiting, errors[waiting], losses, relative_to))
            finished(rows[-1])
        rows.sort(key=lambda row: order.index(row.format))
        _write(out / f"{operands.value}.json", rows)
    return rows


def _write(path: Path, rows: Sequence[PerplexityRow]) -> None:
    """Whole or not at all, also where the process is killed meanwhile."""
    partial_file = path.with_suffix(".partial")
    partial_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    partial_file.replace(path)


def _misfits(quantizations: Mapping[str, QuantizationFormat], columns: Mapping[str, int]) -> dict[str, str]:
    """Formats that cannot encode one of the matrices, and why; columns: of each matrix."""
    found = {}
    for name, quantization in quantizations.items():
        for target, count in columns.items():
            try:
                quantization.check_columns(count)
            except ValueError as error:
                words = {"quantization.ignore": "--ignore", "set quantization.group_size=32": f"use {name.partition(':')[0]}:32"}
                reason = str(error)
                for key, option in words.items():
                    reason = reason.replace(key, option)
                found[name] = f"{target}: {reason}"
                break
    return found


def _report(progress: Progress, name: str, total: int, done: int) -> None:
    progress(name, done, total)


def _label(format: str) -> str:
    """What a format is called in rows and files: lobcq:FOLDER/books.json@16 is lobcq:books@16."""
    plain, rotation = split_rotation(format)
    name, colon, word = plain.partition(":")
    return (f"{name}{colon}{Path(word).stem}" if colon else name) + (f"@{rotation}" if rotation else "")


def _resolved(formats: Sequence[str], targets: Sequence[str]) -> dict[str, QuantizationFormat]:
    """Formats by their labels, full precision first. Raises ValueError for one that does not exist, and two with one label."""
    found: dict[str, QuantizationFormat] = {}
    for format in dict.fromkeys((BASELINE, *formats)):
        plain, rotation = split_rotation(format)
        name, colon, word = plain.partition(":")
        if name not in FORMATS:
            raise ValueError(
                f"--formats {format} is unknown; use some of {', '.join(FORMATS)}, axbxp:k2-w2g16-a3g1 and the like, lobcq:FILE, "
                "int4:64 or lobcq@16"
            )
        if _label(format) in found:
            raise ValueError(f"--formats names two files {_label(format)}; rename one of them")
        given: dict[str, Any] = {}
        if colon and isinstance(FORMATS[name], LoBcq):
            given = {"codebooks": resolved_codebooks(word, "--formats")}
        elif colon and word.isdigit():
            given = {"group_size": int(word)}
        elif colon:
            given = {"precision": resolved_precision(word, f"--formats {name}:") if isinstance(FORMATS[name], AxBxP) else word}
        try:
            found[_label(format)] = resolved_format(name, layers=targets, rotation=rotation, **given)
        except ValueError as error:
            told = str(error).replace("quantization.group_size=", f"{name}:")
            raise ValueError(f"--formats {format}: {told}") from error
    return found


def _check(formats: Sequence[str], relative_to: str | None) -> None:
    if relative_to is not None and relative_to not in formats[1:]:
        raise ValueError(f"--relative-to {relative_to}: there is no increase to compare with; use one of {', '.join(formats[1:])}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Errors:
    bits_per_weight: float
    weight_nmse: float
    activation_nmse: float


@torch.no_grad()
def _errors(quantization: QuantizationFormat, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> _Errors:
    formats = {name: quantization.of_layer(name) for name in weights}
    numbers = sum(weight.numel() for weight in weights.values())
    bits = sum(quantization.bits_per_weight(weight.shape) * weight.numel() for weight in weights.values())
    return _Errors(
        bits_per_weight=(bits + quantization.shared_bits(weights)) / numbers,
        weight_nmse=_mean(_nmse(name, w, formats[name].decode(formats[name].encode(w))) for name, w in weights.items()),
        activation_nmse=_mean(_nmse(name, x, decoded_activations(formats[name], x)) for name, x in inputs.items()),
    )


def _nmse(name: str, exact: Tensor, copy: Tensor) -> float:
    return copy_error(name, exact, copy).relative_error ** 2


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _row(name: str, errors: _Errors, losses: dict[str, list[DocumentLoss]], relative_to: str | None) -> PerplexityRow:
    change, kl = increase(losses[name], losses[BASELINE]), divergence(losses[name])
    ratios: list[Ratio | None] = [None, None]
    if relative_to is not None:
        other = losses[relative_to]
        found = ratio(change, increase(other, losses[BASELINE])), ratio(kl, divergence(other))
        ratios = [Ratio(value=estimate.value, standard_error=estimate.standard_error) for estimate in found]
    return PerplexityRow(
        format=name,
        bits_per_weight=errors.bits_per_weight,
        weight_nmse=errors.weight_nmse,
        activation_nmse=errors.activation_nmse,
        perplexity=perplexity(losses[name]).value,
        increase=change.value,
        standard_error=change.standard_error,
        divergence=kl.value,
        increase_ratio=ratios[0],
        divergence_ratio=ratios[1],
    )
