"""Several wire tensors in one contiguous buffer.

A tensor travels whole, or as the elements that differ from the version before (delta): int32 positions, then values. Every piece
starts at a multiple of ALIGNMENT bytes, so the receiver reads all of them as views of the buffer, without a copy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qurl.sync.fingerprint import fingerprint
from qurl.sync.protocol import Payload, SyncError
from qurl.types import TensorRecord

ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """A tensor that travels as its changes."""

    base_version: int  # the receiver must hold exactly this version
    num_changes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WireTensor:
    """A tensor ready to travel."""

    record: TensorRecord  # of the whole tensor, also where only changes travel
    pieces: tuple[Tensor, ...]  # the tensor, or int32 positions [k] in the flattened tensor and values [k]
    delta: Delta | None

    @property
    def num_bytes(self) -> int:
        """Bytes in a bucket, padding included."""
        return sum(_padded(piece.nbytes) for piece in self.pieces)


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketEntry:
    """One tensor of a bucket."""

    record: TensorRecord
    offset: int  # of its first piece, bytes
    delta: Delta | None


@dataclass(frozen=True, kw_only=True, slots=True)
class WireBucket:
    """Header of a bucket, and where to get its bytes. Plain data: it can be pickled."""

    version: int
    sender_rank: int
    index: int  # of this sender's buckets in this update
    entries: tuple[BucketEntry, ...]
    num_bytes: int
    keep_base: bool  # the next update may come as changes: keep a host copy
    payload: Payload | None = None  # filled by the transport


def describe(name: str, tensor: Tensor) -> TensorRecord:
    """Manifest entry of a tensor."""
    return TensorRecord(
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        num_bytes=tensor.nbytes,
        fingerprint=fingerprint(tensor),
    )


def lay_out(
    tensors: Sequence[WireTensor], *, version: int, sender_rank: int, index: int, keep_base: bool
) -> tuple[WireBucket, list[Tensor]]:
    """Header of a bucket without payload, and the pieces that `pack` puts into its buffer."""
    entries, offset = [], 0
    for tensor in tensors:
        entries.append(BucketEntry(record=tensor.record, offset=offset, delta=tensor.delta))
        offset += tensor.num_bytes
    num_bytes = max(offset, ALIGNMENT)  # where nothing changed: memory cannot be mapped and links cannot send without a byte
    bucket = WireBucket(
        version=version, sender_rank=sender_rank, index=index, entries=tuple(entries), num_bytes=num_bytes, keep_base=keep_base
    )
    return bucket, [piece for tensor in tensors for piece in tensor.pieces]


def pack(pieces: Sequence[Tensor], buffer: Tensor) -> None:
    """Copy the pieces into `buffer` [num_bytes] uint8, each at the next aligned offset. Bytes between them are left as they are."""
    offset = 0
    for piece in pieces:
        raw = piece.detach().contiguous().reshape(-1).view(torch.uint8)
        buffer[offset : offset + len(raw)].copy_(raw)
        offset += _padded(len(raw))


def unpack(bucket: WireBucket, buffer: Tensor) -> Iterator[tuple[BucketEntry, list[Tensor]]]:
    """Each entry with views of its pieces in `buffer`. Raises SyncError where header and buffer do not fit together."""
    if len(buffer) != bucket.num_bytes:
        raise SyncError(
            f"bucket {bucket.index} of rank {bucket.sender_rank} should have {bucket.num_bytes} bytes but {len(buffer)} arrived"
        )
    for entry in bucket.entries:
        record = entry.record
        dtype = _dtype(record)
        if entry.delta is None:
            yield entry, [_view(buffer, entry.offset, dtype, record.shape, record.name)]
        else:
            changes = (entry.delta.num_changes,)
            positions = _view(buffer, entry.offset, torch.int32, changes, record.name)
            values = _view(buffer, entry.offset + _padded(positions.nbytes), dtype, changes, record.name)
            yield entry, [positions, values]


def _dtype(record: TensorRecord) -> torch.dtype:
    """The record's dtype. Raises SyncError where torch has none of that name or the bytes do not match the shape."""
    dtype = vars(torch).get(record.dtype)
    if not isinstance(dtype, torch.dtype):
        raise SyncError(f"{record.name} has dtype {record.dtype!r}, which this torch does not know")
    if math.prod(record.shape) * dtype.itemsize != record.num_bytes:
        raise SyncError(f"{record.name}: {record.dtype} {record.shape} is not {record.num_bytes} bytes")
    return dtype


def _view(buffer: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> Tensor:
    end = offset + math.prod(shape) * dtype.itemsize
    if offset < 0 or offset % ALIGNMENT or end > len(buffer):
        raise SyncError(
            f"{name} should be bytes {offset} to {end} of a bucket of {len(buffer)} bytes, which is truncated or damaged"
        )
    return buffer[offset:end].view(dtype).view(shape)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
