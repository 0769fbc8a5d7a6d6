"""Errors that decide the exit code of the command line; see qurl.cli.main."""

from __future__ import annotations

MAX_MESSAGE_CHARACTERS = 1000


class ConfigError(ValueError):
    """The configuration cannot run; one line that names the key, what was given and what would work. Exit code 2."""


class GuardStop(RuntimeError):
    """A guard ended the run: non-finite loss, too many reward errors or engine restarts. Exit code 3."""


def remote_cause(error: BaseException) -> BaseException:
    """What a Ray actor raised, of the error that Ray raises in its place; any other error as it is."""
    cause = getattr(error, "cause", None)  # of a RayTaskError, whose own text is the actor's traceback
    return cause if isinstance(cause, Exception) else error


def one_line(error: BaseException) -> str:
    """The message in one line; where its class is none of those that we word for people, the class's name first."""
    text = " ".join(str(error).split())[:MAX_MESSAGE_CHARACTERS]
    return text if isinstance(error, ValueError | RuntimeError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


class NonFiniteLoss(GuardStop):
    """Loss or gradient is not finite; no weight changed. sample_ids: the suspects on the rank that raises, if it has any."""

    def __init__(self, message: str, sample_ids: list[str]):
        super().__init__(message, sample_ids)  # both, so that it survives pickling
        self.sample_ids = sample_ids

    def __str__(self) -> str:
        return str(self.args[0])
