"""How many quantized codes an update moves.

Codes are compared where they were encoded, and the ones to compare with are kept there: nothing is copied to the host but one
number an update. An interval of N bounds what that takes on a GPU: each update compares one matrix in N, other ones every time,
and only the matrices that the next update compares are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from qurl.quantization.changes import count_changed_codes, num_codes

ACCELERATOR_INTERVAL = 11
"""Matrices of which one is compared where they lie on a GPU, so that 9 % of the codes are kept there and not all of them. The usual
numbers of matrices in a layer (4, 7) share no divisor with it, so every update sees all kinds of matrices."""


def interval_on(device_type: str, configured: int) -> int:
    """The matrices of which one is compared. configured: sync.track_changes_interval."""
    return configured or (1 if device_type == "cpu" else ACCELERATOR_INTERVAL)


class CodeChanges:
    """Of one sender, over its updates."""

    def __init__(self, interval: int) -> None:
        """interval: see interval_on."""
        self._interval = interval
        self._positions: dict[str, int] = {}
        self._kept: dict[str, tuple[int, Tensor]] = {}  # name -> version and codes
        self._version: int | None = None
        self._base: int | None = None  # the version sent before
        self._changed: list[Tensor] = []
        self.num_codes = 0

    def begin(self, version: int) -> None:
        """Start an update, which is compared with the one begun before."""
        self._base, self._version = self._version, version
        self._changed, self.num_codes = [], 0

    def forget(self) -> None:
        """Compare the next update with nothing."""
        self._kept.clear()

    def see(self, name: str, codes: Tensor) -> None:
        """Take the codes of one matrix; they must not be written to afterwards."""
        assert self._version is not None
        position = self._positions.setdefault(name, len(self._positions))
        interval = interval_on(codes.device.type, self._interval)
        version, previous = self._kept.pop(name, (None, None))
        if (position + self._version) % interval == 0 and previous is not None and version == self._base:
            if (previous.shape, previous.dtype) == (codes.shape, codes.dtype):
                self._changed.append(count_changed_codes(previous, codes))
                self.num_codes += num_codes(codes)
        if (position + self._version + 1) % interval == 0:
            self._kept[name] = self._version, codes

    def num_changed(self) -> int:
        """Codes of this update that differ; waits for the device."""
        return int(torch.stack(self._changed).sum()) if self._changed else 0
