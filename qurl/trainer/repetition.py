"""Responses that end in a loop, told from token ids alone."""

from __future__ import annotations

from collections.abc import Sequence

WINDOW = 64
LONGEST_PERIOD = 16


def ends_in_loop(token_ids: Sequence[int]) -> bool:
    """Whether the WINDOW tokens before the last one repeat with a period of at most LONGEST_PERIOD, four times or more.

    The last token is left out: of a loop that ends it is the end of sequence. Shorter responses end in no loop, whatever they
    say. A loop with a counter in it is none to this measure: every false alarm would cost a run its speed, or its life."""
    tail = list(token_ids[-WINDOW - 1 : -1])
    return len(tail) == WINDOW and any(tail[period:] == tail[:-period] for period in range(1, LONGEST_PERIOD + 1))
