"""Whether another engine would help: the exceptions that ended engines so far."""

from __future__ import annotations

import re
from collections.abc import Set

VARIABLE = re.compile(r"0x[0-9a-f]+|\d+", re.IGNORECASE)
"""Addresses, sizes and counts: what differs when the same thing goes wrong again."""


class EngineErrors:
    """Remembers exceptions by their text without numbers.

    A transient fault, e.g. a GPU that was full for a moment, is worth another engine. A fault of the configuration
    comes again, from an engine that has answered nothing yet. A fault of one prompt comes again where it went."""

    def __init__(self) -> None:
        self._under_way: dict[str, set[str]] = {}  # text -> ids of the requests that were under way when it was raised

    def is_repeated(self, text: str, *, is_fresh: bool, under_way: Set[str]) -> bool:
        """Note an exception, and return whether another engine would raise it again.

        It would where another engine raised it before and either this one is fresh, that is, it has answered
        nothing, or one of the requests under way (by their ids) was under way then too.

        Example:
            >>> errors = EngineErrors()
            >>> errors.is_repeated("RuntimeError: no kernel", is_fresh=True, under_way=set())
            False
            >>> errors.is_repeated("RuntimeError: no kernel", is_fresh=True, under_way=set())
            True
        """
        key = VARIABLE.sub("#", text)
        seen = key in self._under_way
        before = self._under_way.setdefault(key, set())
        repeated = seen and (is_fresh or bool(before & under_way))
        before |= under_way
        return repeated
