"""Finding codebooks: blocks choose their book, books move to their numbers, by turns.

The objective is J, the mean over blocks of the squared error of a block under the nearest entries of its book. Choosing the best
book for each block cannot raise J while books are fixed, and a Lloyd-Max iteration cannot while choices are; so J never rises, and
reaches a local optimum. Two things keep that true: books start from where they were, and a book or entry that nothing chose stays.
Only the last step, rounding entries to whole numbers, may raise it.

Numbers are put on a fine grid first and counted. Sums over counts are exact whatever their order, so the codebooks are the same to
the bit wherever they are made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qurl.quantization.lobcq.codebooks import Codebooks, book_order
from qurl.quantization.lobcq.layout import NUM_ENTRIES, Layout

GRID = 1 << 11
"""Grid points from 0 to the largest codeword."""
OVERSHOOT = 17 / 16
"""How far beyond it numbers can be, since scales are rounded to E4M3."""
LLOYD_STEPS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What was found."""

    codebooks: Codebooks
    objective: list[float]  # J after each round, before entries were rounded
    rounded_objective: float  # J of the codebooks


def calibrate(
    blocks: Tensor, layout: Layout, seed: int = 0, max_rounds: int = 40, start: Codebooks | None = None
) -> Calibration:
    """Codebooks for blocks [n, L_b], in codewords: divided by their array's scale.

    start: codebooks to begin with, of the same layout but for the bits of a codeword; None: those of seeds far from each other.
    Stops when nothing moves any more. Raises ValueError for blocks that are not finite, are all zero, or too few to tell books
    apart."""
    grid = _Grid(layout)
    points = grid.points_of(blocks)
    if start is None:
        books = _initial_books(blocks, points, grid, torch.Generator().manual_seed(seed))
    else:
        books = start.table.double().view(-1, NUM_ENTRIES) * (layout.largest / start.layout.largest)
    choice, objective = _choose(points, grid, books)
    history = [objective]
    for _ in range(max_rounds):
        counts, previous = _count(points, choice, len(books), grid.size), (choice, books)
        for _ in range(LLOYD_STEPS):
            books = _lloyd_step(books, counts, grid)
        choice, objective = _choose(points, grid, books)
        history.append(objective)
        if torch.equal(choice, previous[0]) and torch.equal(books, previous[1]):
            break
    rounded = books.round().clamp(-layout.largest, layout.largest)
    entries = sorted((tuple(int(entry) for entry in book) for book in rounded.tolist()), key=book_order)
    return Calibration(
        codebooks=Codebooks(layout=layout, entries=tuple(entries)),
        objective=history,
        rounded_objective=_choose(points, grid, rounded)[1],
    )


class _Grid:
    """Equidistant values, counted from the smallest."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.reach = int(GRID * OVERSHOOT)
        self.size = 2 * self.reach + 1
        self.values = (torch.arange(self.size, dtype=torch.float64) - self.reach) * (layout.largest / GRID)

    def points_of(self, blocks: Tensor) -> Tensor:
        """int64 [n, L_b]: nearest points. Raises ValueError as calibrate does."""
        needed = self.layout.num_codebooks * NUM_ENTRIES
        if blocks.ndim != 2 or blocks.shape[1] != self.layout.block or len(blocks) < needed:
            raise ValueError(f"LO-BCQ calibrates on at least {needed} blocks of {self.layout.block}, not {tuple(blocks.shape)}")
        if not bool(blocks.isfinite().all()) or not bool(blocks.any()):
            raise ValueError("LO-BCQ calibrates on blocks that are finite and not all zero")
        exact = blocks.double() * (GRID / self.layout.largest)
        return exact.round().clamp(-self.reach, self.reach).long() + self.reach

    def nearest(self, books: Tensor) -> Tensor:
        """int64 [N_c, size]: the entry of each book nearest to each point."""
        middles = (books[:, 1:] + books[:, :-1]) / 2
        return torch.searchsorted(middles.contiguous(), self.values.expand(len(books), -1).contiguous(), right=True)


def _initial_books(blocks: Tensor, points: Tensor, grid: _Grid, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): seeds far from each other, each with the blocks nearest to it; quantiles of those.

    Blocks are compared with their numbers sorted, since the objective does not depend on where in a block a number is."""
    ordered = points.sort(dim=1).values.double()
    num_books = grid.layout.num_codebooks
    seeds = [int(torch.randint(len(ordered), (1,), generator=generator))]
    distances = (ordered - ordered[seeds[0]]).square().sum(dim=1)
    choice = torch.zeros(len(ordered), dtype=torch.int64)
    for book in range(1, num_books):
        cumulative = distances.cumsum(dim=0)  # whole numbers: exact
        draw = torch.rand(1, dtype=torch.float64, generator=generator) * cumulative[-1]
        seeds.append(int(torch.searchsorted(cumulative, draw, right=True).clamp(max=len(ordered) - 1)))
        to_seed = (ordered - ordered[seeds[-1]]).square().sum(dim=1)
        choice[to_seed < distances] = book
        distances = distances.minimum(to_seed)
    counts = _count(points, choice, num_books, grid.size).cumsum(dim=1)
    shares = (torch.arange(NUM_ENTRIES, dtype=torch.float64) + 0.5) / NUM_ENTRIES
    wanted = (counts[:, -1:] * shares).long()
    return grid.values[torch.searchsorted(counts, wanted, right=True)]


def _choose(points: Tensor, grid: _Grid, books: Tensor) -> tuple[Tensor, float]:
    """The best book of each block, and J."""
    nearest = books.gather(1, grid.nearest(books))
    error = (nearest - grid.values).square().T.contiguous()  # [size, N_c]
    total = torch.zeros((len(points), len(books)), dtype=torch.float64)
    for position in range(points.shape[1]):
        total += error[points[:, position]]
    smallest, choice = total.min(dim=1)
    return choice, float(smallest.mean())


def _count(points: Tensor, choice: Tensor, num_books: int, size: int) -> Tensor:
    """int64 [N_c, size]: how often each grid point occurs in the blocks of each book."""
    return torch.bincount((choice[:, None] * size + points).flatten(), minlength=num_books * size).view(num_books, size)


def _lloyd_step(books: Tensor, counts: Tensor, grid: _Grid) -> Tensor:
    """Each entry moves to the mean of the numbers nearest to it."""
    entry = grid.nearest(books)
    occurrences = torch.zeros(books.shape, dtype=torch.int64).scatter_add_(1, entry, counts)
    points = torch.arange(grid.size) - grid.reach
    sums = torch.zeros(books.shape, dtype=torch.int64).scatter_add_(1, entry, counts * points)
    means = sums.double() / occurrences.clamp(min=1) * (grid.layout.largest / GRID)
    return means.where(occurrences > 0, books).sort(dim=1).values
