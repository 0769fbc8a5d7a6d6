"""Errors that decide the exit code of the command line; see qurl.cli.main."""

from __future__ import annotations


class ConfigError(ValueError):
    """The configuration cannot run; one line that names the key, what was given and what would work. Exit code 2."""


class GuardStop(RuntimeError):
    """A guard ended the run: non-finite loss, too many reward errors or engine restarts. Exit code 3."""


class NonFiniteLoss(GuardStop):
    """Loss or gradient is not finite; no weight changed. sample_ids: the suspects on the rank that raises, if it has any."""

    def __init__(self, message: str, sample_ids: list[str]):
        super().__init__(message, sample_ids)  # both, so that it survives pickling
        self.sample_ids = sample_ids

    def __str__(self) -> str:
        return str(self.args[0])
