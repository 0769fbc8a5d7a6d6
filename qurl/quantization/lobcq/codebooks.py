"""A set of frozen codebooks and the search for the nearest of their entries."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qurl.quantization.lobcq.layout import NUM_ENTRIES, Layout

FOLDER = Path(__file__).parent / "data"
CHUNK = 1 << 13
"""Blocks that are searched at a time, so that temporaries stay in the cache."""


@dataclass(frozen=True, kw_only=True)
class Codebooks:
    """[N_c][16] whole numbers within +-layout.largest; each book ascends, and books ascend by their largest magnitude.

    Raises ValueError for anything else."""

    layout: Layout
    entries: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        books, layout = self.entries, self.layout
        if len(books) != layout.num_codebooks or any(len(book) != NUM_ENTRIES for book in books):
            raise ValueError(f"LO-BCQ needs {layout.num_codebooks} codebooks of {NUM_ENTRIES} entries")
        if any(list(book) != sorted(book) or max(map(abs, book)) > layout.largest for book in books):
            raise ValueError(f"LO-BCQ codebooks must ascend within +-{layout.largest}")
        if list(books) != sorted(books, key=book_order):
            raise ValueError("LO-BCQ codebooks must be in the order of their largest magnitudes")

    @cached_property
    def sha256(self) -> str:
        """Of layout and entries."""
        content = json.dumps({"layout": asdict(self.layout), "codebooks": self.entries}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def content(self) -> dict[str, Any]:
        """As plain data that codebooks_of reads: what a file holds, and what travels to engines on other machines."""
        return {"layout": asdict(self.layout), "sha256": self.sha256, "codebooks": [list(book) for book in self.entries]}

    @cached_property
    def table(self) -> Tensor:
        """float32 [N_c * 16]: the entry of code c of book k is 16 k + c."""
        return torch.tensor(self.entries, dtype=torch.float32).flatten()

    def nearest(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Book of each block and code of each number: uint8 [n] and [n, L_b]; blocks: float32 [n, L_b], in codewords.

        The book is the one with the smallest sum of squared errors, the first of equals; a number halfway between two entries
        gets the larger. NaN gets any code."""
        found = [self._search(chunk) for chunk in blocks.split(CHUNK)]
        return torch.cat([books for books, _ in found]), torch.cat([codes for _, codes in found])

    def _search(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        step = _half_step(blocks.nan_to_num(0.0), self.layout.largest)  # [n, L_b]
        errors = torch.zeros((len(blocks), self.layout.num_codebooks), dtype=torch.float32, device=blocks.device)
        candidates = self._nearest_entry.to(blocks.device)  # [steps, N_c]
        for position in range(self.layout.block):  # in this order on every device, so that equal errors stay equal
            candidate = functional.embedding(step[:, position], candidates)
            errors += (candidate - blocks[:, position, None]).square_()
        books = errors.argmin(dim=1)
        codes = self._nearest_code.to(blocks.device)[step, books[:, None]]
        return books.to(torch.uint8), codes

    @cached_property
    def _nearest_code(self) -> Tensor:
        """uint8 [4 largest + 1, N_c]: the code for numbers from s/2 to (s + 1)/2, where s starts at -2 largest.

        Middles between whole numbers are multiples of 1/2, so all numbers in between have the same nearest entry."""
        half_steps = torch.arange(4 * self.layout.largest + 1) / 2.0 - self.layout.largest
        books = self.table.view(-1, NUM_ENTRIES)
        codes = [torch.bucketize(half_steps, (book[:-1] + book[1:]) / 2, right=True) for book in books]
        return torch.stack(codes, dim=1).to(torch.uint8)

    @cached_property
    def _nearest_entry(self) -> Tensor:
        """float32, as _nearest_code."""
        offsets = NUM_ENTRIES * torch.arange(self.layout.num_codebooks)
        return self.table[self._nearest_code.long() + offsets]


def book_order(book: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Key by which books are sorted."""
    return max(map(abs, book)), book


def save_codebooks(codebooks: Codebooks, path: Path, command: str) -> None:
    """Write a file that load_codebooks reads. command: how the codebooks were made."""
    content = codebooks.content
    lines = {"command": command, "layout": content["layout"], "sha256": content["sha256"]}
    head = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in lines.items())
    books = ",\n".join(json.dumps(book) for book in content["codebooks"])
    path.write_text(f'{{{head},\n"codebooks": [\n{books}\n]}}\n', encoding="utf-8")


def load_codebooks(path: Path, sha256: str | None = None) -> Codebooks:
    """Codebooks of a file. Raises ValueError where it is damaged, or its hash is not `sha256` (default: the one it states)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no LO-BCQ codebooks: {error}") from error
    return codebooks_of(content, str(path), sha256)


def codebooks_of(content: Any, source: str, sha256: str | None = None) -> Codebooks:
    """The inverse of Codebooks.content. source: where it comes from, for errors. Raises ValueError as load_codebooks does."""
    try:
        entries = tuple(tuple(int(entry) for entry in book) for book in content["codebooks"])
        codebooks = Codebooks(layout=Layout(**content["layout"]), entries=entries)
        expected = sha256 or str(content["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} holds no LO-BCQ codebooks: {type(error).__name__}: {error}") from error
    refuse_other_hash(codebooks.sha256, expected, source)
    return codebooks


def refuse_other_hash(found: str, expected: str, source: str) -> None:
    """Raises ValueError."""
    if found != expected:
        raise ValueError(
            f"{source} holds LO-BCQ codebooks {found[:12]}, not {expected[:12]}, with which weights would decode to "
            "wrong numbers; restore the file, or make it again with the command that it names"
        )


def _half_step(values: Tensor, largest: int) -> Tensor:
    """int32: which half of a whole number, counted from -largest, a value lies in; values beyond +-largest count as these."""
    return (2.0 * values.clamp(-largest, largest)).floor_().int() + 2 * largest
