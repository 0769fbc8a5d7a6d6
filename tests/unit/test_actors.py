"""What crosses the border of an actor when something is raised inside."""

import asyncio
import json
import pickle

import pydantic
import pytest

from qurl.actors import portable, portable_errors
from qurl.errors import ConfigError, NonFiniteLoss


class Odd(OSError):
    """Can be written by pickle, but not read: its constructor wants more than its arguments."""

    def __init__(self, path, *, code):
        super().__init__(path)
        self.code = code


class Settings(pydantic.BaseModel):
    architecture: str

    @pydantic.field_validator("architecture")
    @classmethod
    def is_known(cls, value):
        raise ValueError(f"architecture {value} is not supported")


def validation_error():
    try:
        Settings(architecture="qwen3_5_text")
    except pydantic.ValidationError as error:
        return error


@pytest.mark.parametrize("error", [KeyError("a"), ConfigError("a=1: use 2"), NonFiniteLoss("step 3", ["s"]), OSError(2, "gone")])
def test_errors_that_every_process_can_read_stay_as_they_are(error):
    assert portable(error) is error


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (validation_error(), ValueError, "ValidationError: architecture qwen3_5_text is not supported"),
        (json.JSONDecodeError("no value", "", 0), ValueError, "JSONDecodeError: no value: line 1 column 1 (char 0)"),
        (Odd("/x", code=3), OSError, "Odd: /x"),
        (type("Cuda", (RuntimeError,), {})("out of memory"), RuntimeError, "Cuda: out of memory"),
        (type("Local", (Exception,), {})("lost"), RuntimeError, "Local: lost"),
    ],
)
def test_every_other_error_keeps_its_words_and_survives_pickling(error, kind, text):
    found = pickle.loads(pickle.dumps(portable(error)))
    assert type(found) is kind and str(found) == text


@portable_errors
class Actor:
    def plain(self):
        raise Odd("plain", code=1)

    async def waits(self):
        raise Odd("waits", code=1)

    async def streams(self):
        yield 1
        raise Odd("streams", code=1)

    def ours(self):
        raise ConfigError("a=1: use 2")


def test_methods_of_every_kind_raise_portable_errors():
    async def collect():
        return [item async for item in Actor().streams()]

    calls = {
        "plain": Actor().plain,
        "waits": lambda: asyncio.run(Actor().waits()),
        "streams": lambda: asyncio.run(collect()),
    }
    for name, call in calls.items():
        with pytest.raises(OSError, match=f"Odd: {name}") as raised:
            call()
        assert type(raised.value) is OSError and isinstance(raised.value.__cause__, Odd)
    with pytest.raises(ConfigError) as raised:
        Actor().ours()
    assert raised.value.__cause__ is None
