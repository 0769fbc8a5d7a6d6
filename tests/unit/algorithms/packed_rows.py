"""Rows that hold several sequences, for the tests of what looks at whole sequences."""

from __future__ import annotations

import torch

SEGMENTS = [  # sequence of each position; -1 is padding
    [0, 0, 0, 0, 1, 1, 1, -1],
    [2, 2, 2, 2, 2, 2, 2, 2],
    [3, 4, 4, 4, 5, 5, -1, -1],
]
MASK = [  # sequence 3 trains nothing, sequence 2 has a hole
    [0, 1, 1, 1, 0, 1, 1, 0],
    [0, 0, 1, 1, 0, 1, 1, 1],
    [0, 0, 1, 1, 0, 1, 0, 0],
]


def packed():
    """(segment_ids, mask), [3, 8]."""
    return torch.tensor(SEGMENTS), torch.tensor(MASK, dtype=torch.bool)


def trained_positions():
    """Positions of the trained tokens of each sequence that has any, in order."""
    found: dict[int, list[tuple[int, int]]] = {}
    for row, (segments, mask) in enumerate(zip(SEGMENTS, MASK, strict=True)):
        for column, (segment, is_trained) in enumerate(zip(segments, mask, strict=True)):
            if is_trained:
                found.setdefault(segment, []).append((row, column))
    return list(found.values())


def one_sequence_per_row():
    """(segment_ids, mask, index) of the same sequences one per row; tensor.flatten()[index] moves values there, 0 on padding."""
    flat = [(s, i) for i, s in enumerate(x for row in SEGMENTS for x in row) if s >= 0]
    segment_ids = torch.full((6, 8), -1)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    index = torch.zeros(6, 8, dtype=torch.int64)
    filled = [0] * 6
    for segment, position in flat:
        at = segment, filled[segment]
        segment_ids[at], index[at] = segment, position
        mask[at] = bool(MASK[position // 8][position % 8])
        filled[segment] += 1
    return segment_ids, mask, index
