"""How fast an evaluation samples, and for how long it will: within a batch too, when no problem has come to its end for minutes."""

from __future__ import annotations

from collections import deque

WINDOW_S = 30.0
"""Seconds that the speed is a mean over."""


class Speed:
    """Tokens as engines report them, problems as they end."""

    def __init__(self, num_problems: int, max_tokens: int, now: float) -> None:
        """num_problems: that are to be sampled. max_tokens: that all samples of a problem can have together."""
        self._left = num_problems
        self._max_tokens = max_tokens
        self._finished = 0
        self._finished_tokens = 0
        self.num_tokens = 0
        self._seen: deque[tuple[float, int]] = deque([(now, 0)])  # (time, tokens by then)

    def sampled(self, now: float, num_tokens: int) -> None:
        """Engines have sampled so many tokens since the start. They say fewer where one was replaced, which is left out."""
        self.num_tokens = max(num_tokens, self.num_tokens)
        self._seen.append((now, self.num_tokens))
        while len(self._seen) > 2 and now - self._seen[1][0] > WINDOW_S:
            self._seen.popleft()

    def finished(self, now: float, num_tokens: int) -> None:
        """A problem whose samples have so many tokens together has ended."""
        self._left -= 1
        self._finished += 1
        self._finished_tokens += num_tokens
        self.sampled(now, self._finished_tokens)  # engines may not have been asked since

    @property
    def tokens_per_s(self) -> float:
        """Over the last WINDOW_S seconds; 0 before anything is known."""
        (start, before), (end, now) = self._seen[0], self._seen[-1]
        return (now - before) / (end - start) if end > start else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds that the rest takes at this speed; None while nothing was sampled.

        Problems that have not ended are expected to be as long as those that have, and as long as they can be before one has."""
        if self.tokens_per_s <= 0:
            return None
        length = self._finished_tokens / self._finished if self._finished else self._max_tokens
        under_way = max(0, self.num_tokens - self._finished_tokens)
        return max(0.0, self._left * length - under_way) / self.tokens_per_s

    def __str__(self) -> str:
        if self.left_s is None:
            return "no tokens yet"
        minutes, seconds = divmod(round(self.left_s), 60)
        words = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        return f"{self.tokens_per_s:,.0f} tokens/s, {'about' if self._finished else 'at most'} {words} left"
