"""The sets that sampled tokens were drawn from, packed.

Top-p and top-k cut the distribution before a token is drawn. The learner must renormalize over the very same tokens, or every
ratio is off by the mass that was cut away. A threshold would be shorter than the tokens, but the learner's logits differ from
the engine's, so it would cut another set. Sets are small where a model is sure of itself (a handful of tokens). Where it is not,
a set may be nearly the whole vocabulary, so a set of more than 1/32 of it travels as one bit per token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qurl.types import KeptTokens


def pack_sets(token_ids: Sequence[int], sets: Sequence[Sequence[int] | np.ndarray], vocab_size: int) -> KeptTokens:
    """Pack the set that each of the sampled tokens was drawn from; ids in [0, vocab_size), ascending.

    Raises ValueError where a token is not in its set, or a set is not in order.

    Example:
        >>> kept = pack_sets([7, 3], [[7], [1, 3]], vocab_size=1000)
        >>> kept.sizes.tolist(), [ids.tolist() for ids in unpack_sets(kept)]
        ([1, 2], [[7], [1, 3]])
    """
    sizes = np.fromiter(map(len, sets), dtype=np.int32, count=len(sets))
    flat = np.concatenate([np.empty(0, np.int32), *sets]).astype(np.int32)
    owner = np.repeat(np.arange(len(sets)), sizes)
    is_found = np.bincount(owner[flat == np.asarray(token_ids, np.int32)[owner]], minlength=len(sets)) == 1
    in_order = (np.diff(flat) > 0) | (np.diff(owner) > 0)
    if not (is_found.all() and in_order.all()):
        raise ValueError("a sampled token is not in the set that it was drawn from, or a set is not in ascending order")
    if not is_bitmap(sizes, vocab_size).any():
        data = flat.view(np.uint8)
    else:
        data = np.concatenate([_pack(ids, vocab_size) for ids in np.split(flat, np.cumsum(sizes)[:-1])])
    return KeptTokens(sizes=sizes, data=data, vocab_size=vocab_size)


def unpack_sets(kept: KeptTokens) -> Iterator[np.ndarray]:
    """Yield the ascending token ids, int32, of each sampled token."""
    starts = np.cumsum(packed_sizes(kept)) - packed_sizes(kept)
    for start, length, size in zip(starts, packed_sizes(kept), kept.sizes, strict=True):
        packed = kept.data[start : start + length]
        if is_bitmap(size, kept.vocab_size):
            yield np.flatnonzero(np.unpackbits(packed, bitorder="little")).astype(np.int32)
        else:
            yield packed.view(np.int32)


def split_kinds(kept: KeptTokens, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sort the sets of tokens start to stop by how they are packed, for one scatter on a device instead of a loop.

    Returns (row, id) of every entry that is stored as an id, int64 [K] each, then the rows of the bitmaps, int64 [D], and the
    bitmaps, uint8 [D, ceil(vocab_size / 8)]. Rows count from `start`; bit i of byte j speaks of token 8 * j + i."""
    sizes, ends = kept.sizes[start:stop], np.cumsum(packed_sizes(kept))
    first = ends[start - 1] if start else 0
    data = kept.data[first : ends[stop - 1] if stop else 0]
    dense = is_bitmap(sizes, kept.vocab_size)
    is_id_byte = np.repeat(~dense, packed_sizes(kept)[start:stop])
    ids = data[is_id_byte].view(np.int32).astype(np.int64)
    rows = np.repeat(np.flatnonzero(~dense), sizes[~dense])
    bitmaps = data[~is_id_byte].reshape(-1, _bitmap_bytes(kept.vocab_size))
    return rows, ids, np.flatnonzero(dense), bitmaps


def join_sets(parts: Sequence[KeptTokens]) -> KeptTokens:
    """Concatenate the sets of several sequences, at least one. Raises ValueError where their vocabularies differ."""
    if len({part.vocab_size for part in parts}) != 1:
        raise ValueError(f"kept tokens speak of vocabularies of {sorted({part.vocab_size for part in parts})}; they must be one")
    return KeptTokens(
        sizes=np.concatenate([part.sizes for part in parts]),
        data=np.concatenate([part.data for part in parts]),
        vocab_size=parts[0].vocab_size,
    )


def packed_sizes(kept: KeptTokens) -> np.ndarray:
    """Bytes of each set, int64 [N]."""
    return np.minimum(4 * kept.sizes.astype(np.int64), _bitmap_bytes(kept.vocab_size))


def is_bitmap(size: Any, vocab_size: int) -> Any:
    """Whether sets of so many tokens (a numpy number or array) are packed as one bit per token of the vocabulary."""
    return 4 * size.astype(np.int64) > _bitmap_bytes(vocab_size)


def max_bytes_per_token(top_k: int, vocab_size: int) -> int:
    """The most that one set takes. top_k: -1 where it cuts nothing."""
    return min(4 * (top_k if top_k > 0 else vocab_size), _bitmap_bytes(vocab_size))


def _pack(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    if not is_bitmap(np.int64(len(ids)), vocab_size):
        return ids.view(np.uint8)
    is_kept = np.zeros(vocab_size, dtype=bool)
    is_kept[ids] = True
    return np.packbits(is_kept, bitorder="little")


def _bitmap_bytes(vocab_size: int) -> int:
    return -(-vocab_size // 8)
