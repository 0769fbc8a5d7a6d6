"""What all processes of a run must see under the same paths, whichever node they are on: the run folder, into which ranks
write their shards of a checkpoint, the folders of models, and files of outside code.

Each process looks before it begins anything heavy. The driver writes a file into the run folder, a process reads it and
writes one of its own beside it, and the driver reads that. Every file has a name that nobody looked up before, so a
network file system cannot answer from a cache."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qurl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

Written = dict[str, dict[str, int]]
"""Host -> bytes of each file below a folder as that host sees it."""

FOLDER = ".seen"
DRIVER = "driver"


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedFiles:
    """What the driver sees, to be compared where another process is."""

    run_dir: Path  # absolute
    token: str  # name of the folder of probe files, and content of each
    paths: Mapping[str, tuple[str, Mapping[str, int]]]  # configuration key -> (absolute path, bytes of its files by name)

    def refuse_blindness(self, who: str, host: str) -> None:
        """Read what process `who` wrote, in the driver. Raises ConfigError where it is not there."""
        if _content(self.folder / who) != self.token:
            raise ConfigError(
                f"output_dir={self.run_dir.parent}: what {who} wrote to {self.run_dir} on {host} is not seen on {host_name()}, "
                "where `qurl train` runs; use a folder that all nodes share, under the same path on each"
            )

    @property
    def folder(self) -> Path:
        """Where probe files are."""
        return self.run_dir / FOLDER / self.token


@contextmanager
def shared_files(run_dir: Path, paths: Mapping[str, str]) -> Iterator[SharedFiles]:
    """Write the driver's probe file, and remove all of them at the end.

    run_dir: absolute. paths: configuration key -> absolute path of a file or folder. Raises ConfigError where nothing can be
    written."""
    found = SharedFiles(
        run_dir=run_dir, token=secrets.token_hex(8), paths={key: (path, _sizes(path)) for key, path in paths.items()}
    )
    try:
        found.folder.mkdir(parents=True)
        (found.folder / DRIVER).write_text(found.token)
    except OSError as error:
        raise ConfigError(f"output_dir={run_dir.parent}: {error.filename} cannot be written ({error.strerror})") from error
    try:
        yield found
    finally:
        shutil.rmtree(run_dir / FOLDER, ignore_errors=True)


def look(files: SharedFiles, who: str, *, writes: bool) -> str:
    """See what the driver sees, in the process `who`, and leave word of it. Returns the name of this host.

    writes: whether this process writes into the run folder. Raises ConfigError, naming host, folder and remedy."""
    host = host_name()
    if writes:
        _look_at_run_folder(files, who, host)
    for key, (path, sizes) in files.paths.items():
        _look_at(key, path, sizes, f"{host}, where {who} runs")
    return host


def _look_at_run_folder(files: SharedFiles, who: str, host: str) -> None:
    remedy = "use a folder that all nodes share, under the same path on each"
    if _content(files.folder / DRIVER) != files.token:
        raise ConfigError(
            f"output_dir={files.run_dir.parent}: {host}, where {who} runs, does not see the run folder {files.run_dir}; {remedy}"
        )
    try:
        (files.folder / who).write_text(files.token)
    except OSError as error:
        raise ConfigError(
            f"output_dir={files.run_dir.parent}: {who} cannot write to {files.run_dir} on {host} ({error.strerror}); {remedy}"
        ) from error


def _look_at(key: str, path: str, sizes: Mapping[str, int], where: str) -> None:
    remedy = "put it on a folder that all nodes share, or copy it to the same path on each"
    if not os.path.exists(path):
        raise ConfigError(f"{key}={path} does not exist on {where}; {remedy}")
    here = _sizes(path)
    for name, size in sizes.items():
        if name not in here:
            raise ConfigError(f"{key}={path} has no {name} on {where}; {remedy}")
        if here[name] != size:
            raise ConfigError(f"{key}={path}: {name} has {here[name]} bytes on {where}, and {size} for the driver; {remedy}")


def host_name() -> str:
    """This host by name and address."""
    name = socket.gethostname()
    try:
        return f"{name} ({socket.gethostbyname(name)})"
    except OSError:
        return name


def _content(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _sizes(path: str) -> dict[str, int]:
    """Bytes of a file, or of each file in a folder, by name."""
    files = Path(path).iterdir() if os.path.isdir(path) else [Path(path)]
    return {file.name: file.stat().st_size for file in sorted(files) if file.is_file()}
