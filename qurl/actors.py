"""The border of an actor: what is raised inside arrives in the driver as what it was, with its own words.

Ray pickles an exception to carry it, and many classes do not survive that. pydantic's ValidationError cannot be
written, others cannot be read again, and the driver then sees an error about pickling. A class of vLLM would be
read by importing vLLM into the driver, which takes ten seconds. So only Python's exceptions and ours travel as
they are; any other becomes the nearest of Python's."""

from __future__ import annotations

import functools
import inspect
import logging
import pickle
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

logger = logging.getLogger(__name__)
C = TypeVar("C", bound=type)
KEPT = ("builtins", "qurl")
"""Packages whose exceptions every process can read."""


def portable(error: Exception) -> Exception:
    """`error` itself where every process can read it, else a ValueError, OSError or RuntimeError with its class and text.

    Example:
        >>> import json
        >>> portable(KeyError("a"))
        KeyError('a')
        >>> portable(json.JSONDecodeError("no value", "", 0))
        ValueError('JSONDecodeError: no value: line 1 column 1 (char 0)')
    """
    if type(error).__module__.partition(".")[0] in KEPT and _survives_pickling(error):
        return error
    kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
    return kind(f"{type(error).__name__}: {_text(error)}")


def portable_errors(actor: C) -> C:
    """Class decorator: every public method, async or not, raises only what `portable` returns; the output has the traceback."""
    for name, function in list(vars(actor).items()):
        if inspect.isfunction(function) and not name.startswith("_"):
            setattr(actor, name, _wrapped(function))
    return actor


def _wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(function):

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            try:
                async for item in function(*args, **kwargs):
                    yield item
            except Exception as error:  # trust boundary: vLLM, DeepSpeed and transformers raise whatever they like
                _raise(error)
    elif inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            try:
                return await function(*args, **kwargs)
            except Exception as error:
                _raise(error)
    else:

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                _raise(error)

    return wrapper


def _raise(error: Exception) -> NoReturn:
    """Raise `portable(error)` in an except clause."""
    if (found := portable(error)) is error:
        raise error
    logger.error("%s", error, exc_info=error)  # the traceback stays here: Ray carries that of an error it can pickle
    raise found from error


def _survives_pickling(error: Exception) -> bool:
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # trust boundary: an exception's own constructor and attributes
        return False
    return type(copy) is type(error) and str(copy) == str(error)


def _text(error: Exception) -> str:
    """What the error says; of pydantic's only the messages, without the inputs and links that follow them."""
    errors = getattr(error, "errors", None)
    if type(error).__module__.startswith("pydantic") and callable(errors):
        return "; ".join(entry["msg"].removeprefix("Value error, ") for entry in errors())
    return str(error)
