"""Errors that decide the exit code of the command line; see qurl.cli.main."""

from __future__ import annotations


class ConfigError(ValueError):
    """The configuration cannot run; one line that names the key, what was given and what would work. Exit code 2."""


class GuardStop(RuntimeError):
    """A guard ended the run: non-finite loss, too many reward errors or engine restarts. Exit code 3."""
