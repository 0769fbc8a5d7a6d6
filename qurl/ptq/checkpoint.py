"""A Hugging Face folder in low precision, as wire tensors: what the engines hold, byte for byte, and any format there is.

config.json names this project's vLLM plugin, so vLLM loads the folder as it is wherever the project is installed. One file is
written per decoder layer, and a record of it behind it; a process that is killed leaves whole layers, and the same command goes on
after them. config.json comes last, so an unfinished folder does not load.

    model-00001.safetensors ...   a decoder layer each; what belongs to none is a file of its own
    report.json                   settings, bits, the error of every matrix
    .unfinished/                  settings and records, until all is written"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qurl.quantization import QuantizationFormat, resolved_format
from qurl.quantization.error_report import copy_error
from qurl.quantization.source import INDEX, Source, checked_targets, source_of_folder
from qurl.quantization.targets import engine_groups
from qurl.vllm_plugin import CHECKPOINT_VERSION, quantization_config

REPORT = "report.json"
UNFINISHED = ".unfinished"
Progress = Callable[[int, int], None]  # (done, total) tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeSettings:
    """What decides the content of a checkpoint."""

    format: str  # key of FORMATS
    ignore: tuple[str, ...] = ()  # patterns of qurl.quantization.select_targets
    codebooks: Mapping[str, Any] | None = None  # the content of a file of quantization.codebooks; None: the package's
    precision: str | Mapping[str, str] | None = None  # as quantization.precision, of format axbxp
    rotation: int = 0  # as quantization.rotation
    group_size: int = 0  # as quantization.group_size

    def quantization(self, targets: Collection[str]) -> QuantizationFormat:
        """The format, with the precision of each of the modules to quantize. Raises ValueError as resolved_format does."""
        return resolved_format(
            self.format, codebooks=self.codebooks, precision=self.precision, rotation=self.rotation, group_size=self.group_size,
            layers=targets,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixReport:
    """One encoded matrix."""

    module: str
    shape: tuple[int, int]  # outputs, inputs
    sqnr_db: float | None  # 10 log10(|W|^2 / |W - decoded|^2); None where the copy is exact
    relative_error: float  # |W - decoded| / |W|


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeReport:
    """What was written; see REPORT for the file."""

    settings: dict[str, Any]
    matrices: list[MatrixReport]  # worst first
    bits_formula: float  # per encoded weight, scales and own codebooks included, by QuantizationFormat
    bits_on_disk: float  # the same from the sizes in the files, but for codebooks, which are in config.json
    checkpoint_bytes: int  # of all tensors
    source_bytes: int  # of all tensors of the source


def quantize_folder(
    source: Path, out: Path, settings: QuantizeSettings, progress: Progress = lambda done, total: None
) -> QuantizeReport:
    """Write `source`, a Hugging Face folder with safetensors, to `out`, or go on where an earlier call with the same arguments
    ended; where all is written already, the report is read.

    Nothing is written before every weight has been looked at. Raises ValueError where the source is no such folder, quantized
    already or a mixture of experts; for a pattern that cannot be honoured, a weight that is not finite, all zero or does not fit
    the format; and where `out` is something else, or was begun with other arguments."""
    with ExitStack() as stack:
        opened = source_of_folder(source, stack)
        targets = checked_targets(opened, settings.ignore)
        check_fusion(opened, targets, settings.ignore)
        quantization = settings.quantization(sorted(targets))
        wanted: dict[str, Any] = {"format": settings.format, "ignore": list(settings.ignore), "precision": settings.precision}
        wanted |= {"rotation": settings.rotation, "source": folder_digest(source), "version": CHECKPOINT_VERSION}
        wanted |= {"group_size": settings.group_size} if settings.group_size else {}
        wanted |= {} if quantization.codebooks_sha256 is None else {"codebooks": quantization.codebooks_sha256}
        if _is_begun(out, wanted):
            if not (out / UNFINISHED).exists():
                return _read_report(out)
        else:
            _check_weights(opened, targets, quantization)
            (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
            _write_json(out / UNFINISHED / "settings.json", wanted)
        records = _write_files(opened, out, targets, quantization, progress)
    return _finish(opened, out, wanted, settings, records)


def _write_files(
    source: Source, out: Path, targets: frozenset[str], quantization: QuantizationFormat, progress: Progress
) -> list[dict[str, Any]]:
    """The missing files; returns the records of all."""
    records, done = [], 0
    for number, names in enumerate(_files(source), start=1):
        file = f"model-{number:05d}.safetensors"
        record_file = out / UNFINISHED / f"{file}.json"
        if not record_file.is_file() or not (out / file).is_file():
            matrices: list[dict[str, Any]] = []
            tensors: dict[str, Tensor] = {}
            source_bytes = 0
            for count, name in enumerate(names, start=1):
                weight = source.read(name)
                source_bytes += weight.nbytes
                module, _, leaf = name.rpartition(".")
                if leaf == "weight" and module in targets:
                    wire, report = _encoded(module, weight, quantization)
                    tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in wire.items()}
                    matrices.append(asdict(report))
                else:
                    tensors[name] = weight
                progress(done + count, len(source.names))
            _save(tensors, out / file)
            _write_json(record_file, {"file": file, "matrices": matrices, "source_bytes": source_bytes})
        done += len(names)
        progress(done, len(source.names))
        records.append(json.loads(record_file.read_text()))
    return records


def _files(source: Source) -> list[list[str]]:
    """Names of the tensors of each file: those of a decoder layer, 'model.layers.3' and below, and the rest."""
    files: dict[str, list[str]] = {}
    for name in source.names:
        match = re.match(r".*?\.\d+(?=\.)", name)
        files.setdefault(match.group() if match else "", []).append(name)
    return list(files.values())


def _encoded(module: str, weight: Tensor, quantization: QuantizationFormat) -> tuple[dict[str, Tensor], MatrixReport]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = weight.to(device)
    format = quantization.of_layer(module)
    wire = format.encode(weight)
    error = copy_error(module, weight, format.decode(wire))
    sqnr_db = error.sqnr_db if error.relative_error else None
    rows, columns = weight.shape
    report = MatrixReport(module=module, shape=(rows, columns), sqnr_db=sqnr_db, relative_error=error.relative_error)
    return {suffix: tensor.cpu() for suffix, tensor in wire.items()}, report


def _finish(
    source: Source, out: Path, wanted: dict[str, Any], settings: QuantizeSettings, records: list[dict[str, Any]]
) -> QuantizeReport:
    sizes: dict[str, int] = {}
    weight_map: dict[str, str] = {}
    for record in records:
        found = _stored_sizes(out / record["file"])
        sizes |= found
        weight_map |= dict.fromkeys(found, record["file"])
    matrices = [MatrixReport(**matrix) for record in records for matrix in record["matrices"]]
    matrices.sort(key=lambda matrix: -matrix.relative_error)
    numbers = {matrix.module: matrix.shape[0] * matrix.shape[1] for matrix in matrices}
    quantization = settings.quantization(sorted(numbers))
    suffixes = quantization.wire_row(matrices[0].shape[1]).keys()
    on_disk = sum(sizes[f"{module}.{suffix}"] for module in numbers for suffix in suffixes)
    formula = sum(quantization.bits_per_weight(matrix.shape) * numbers[matrix.module] for matrix in matrices)
    formula += quantization.shared_bits(numbers)
    report = QuantizeReport(
        settings=wanted,
        matrices=matrices,
        bits_formula=formula / sum(numbers.values()),
        bits_on_disk=8 * on_disk / sum(numbers.values()),
        checkpoint_bytes=sum(sizes.values()),
        source_bytes=sum(record["source_bytes"] for record in records),
    )
    for file in source.files:
        shutil.copyfile(file, out / file.name)
    _write_json(out / INDEX, {"metadata": {"total_size": report.checkpoint_bytes}, "weight_map": weight_map})
    _write_json(out / REPORT, asdict(report))
    _write_json(out / "config.json", {**source.config, "quantization_config": _config_entry(settings)})
    shutil.rmtree(out / UNFINISHED)
    return report


def _config_entry(settings: QuantizeSettings) -> dict[str, Any]:
    return quantization_config(
        settings.format, settings.ignore, encoded=True, codebooks=settings.codebooks, precision=settings.precision,
        rotation=settings.rotation, group_size=settings.group_size,
    )


def _is_begun(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` holds this very checkpoint, in part or whole. Raises ValueError where it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if out.is_dir() and (out / UNFINISHED).is_dir() and not (out / UNFINISHED / "settings.json").is_file():
        return False  # killed before its first byte
    try:
        settings_file = out / UNFINISHED / "settings.json"
        is_finished = not settings_file.is_file()
        found = json.loads((out / REPORT).read_text())["settings"] if is_finished else json.loads(settings_file.read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out} exists and is no checkpoint of `qurl quantize`; name a new folder") from error
    if different := [key for key in wanted if found.get(key) != wanted[key]]:
        key = different[0]
        raise ValueError(
            f"{out} holds a checkpoint of other arguments ({key}: {found.get(key)} there, {wanted[key]} now); name a new folder, "
            "or delete that one"
        )
    return True


def _check_weights(source: Source, targets: frozenset[str], quantization: QuantizationFormat) -> None:
    """Raises ValueError for the first weight that cannot or should not be encoded; shapes first, since they cost nothing."""
    for module in sorted(targets):
        try:
            quantization.check_columns(source.shapes[f"{module}.weight"][-1])
        except ValueError as error:
            told = str(error).replace("quantization.ignore", "--ignore").replace("quantization.codebooks", "--codebooks")
            raise ValueError(f"{module}: {told}") from error
    for module in sorted(targets):
        weight = source.read(f"{module}.weight")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{module}.weight of the source holds NaN or Inf; the checkpoint is damaged or training diverged")
        if not bool(weight.any()):
            raise ValueError(f"{module}.weight of the source is all zeros; the checkpoint is damaged, or give --ignore {module}")


def check_fusion(source: Source, targets: frozenset[str], ignore: Sequence[str]) -> None:
    """Raises ValueError where engines would refuse the patterns."""
    for group in engine_groups(source.linear_names).values():
        ignored = [name for name in group if name not in targets]
        if ignored and len(ignored) < len(group):
            raise ValueError(
                f"--ignore {' '.join(ignore)} keeps {', '.join(ignored)} in full precision, but an engine runs "
                f"{', '.join(group)} as one matrix; ignore all of them or none"
            )


def folder_digest(folder: Path) -> str:
    """SHA-256 of a folder's weights and config.json: what is known of one model is never taken for another's."""
    digest = hashlib.sha256()
    for file in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def add_to_report(out: Path, **parts: Any) -> None:
    """Beside what quantize_folder wrote to REPORT."""
    _write_json(out / REPORT, json.loads((out / REPORT).read_text()) | parts)


def _read_report(out: Path) -> QuantizeReport:
    content = json.loads((out / REPORT).read_text())
    content["matrices"] = [MatrixReport(**matrix) for matrix in content["matrices"]]
    return QuantizeReport(**{field.name: content[field.name] for field in fields(QuantizeReport)})


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """All or nothing."""
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    partial.replace(path)


def _stored_sizes(path: Path) -> dict[str, int]:
    """Bytes of each tensor, from the header of a safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _write_json(path: Path, content: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
