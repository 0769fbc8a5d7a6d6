"""Control tokens that come from the wrong place: appended by the tokenizer, doubled, or spelled in a row's text."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qurl.config import ControlTokens
from qurl.data.problems import Problem

logger = logging.getLogger(__name__)

SHIELD = "\ue0f0{}\ue0f1"  # characters of private use, around the number of what they stand for
SHIELDED = re.compile("\ue0f0(\\d+)\ue0f1")


def encode(texts: Sequence[str], tokenizer: Any, add_special_tokens: bool) -> list[list[int]]:
    """Return the tokens of prompts, to be continued: without what the tokenizer appends, with what it prepends once.

    A tokenizer that ends every text with its end of sequence would tell the model that nothing is left to say. A template that
    begins with the beginning of sequence would have it twice."""
    found = [list(ids) for ids in tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]]
    if not add_special_tokens:
        return found
    before, after = added_tokens(tokenizer)
    if after:
        names = "".join(tokenizer.convert_ids_to_tokens(after))
        logger.warning("the tokenizer appends %s to every text; prompts go without it", names)
        found = [ids[: -len(after)] if ids[-len(after) :] == after else ids for ids in found]
    return [ids[len(before) :] if before and ids[: 2 * len(before)] == 2 * before else ids for ids in found]


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer puts before and behind a text."""
    bare = list(tokenizer("1", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("1", add_special_tokens=True)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


class ControlTokenGuard:
    """Keeps control tokens that a row's own text spells out of the prompt's structure, and counts the rows."""

    def __init__(self, tokenizer: Any, mode: ControlTokens, key: str) -> None:
        """mode: with `keep` every text passes as it is."""
        specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = sorted(
            {name for name in [*specials, *tokenizer.all_special_tokens] if name.strip()},
            key=len,
            reverse=True,
        )
        self._pattern = (
            re.compile("|".join(map(re.escape, names))) if names and mode is ControlTokens.text else None
        )
        self._tokenizer, self._key = tokenizer, key
        self._found: list[str] = []  # what each shield stands for
        self._rows: list[tuple[str, str]] = []  # (place, first token)

    def shielded(self, problem: Problem) -> Problem:
        """Return the problem with shields in place of control tokens in its texts."""
        turns = problem.messages or []
        texts = [problem.text, *(turn["content"] for turn in turns)]
        first = next(
            (found[0] for text in texts if self._pattern and (found := self._pattern.search(text))), None
        )
        if first is None:
            return problem
        self._rows.append((problem.place, first))
        return replace(
            problem,
            text=self._shield(problem.text),
            messages=problem.messages
            and [{**turn, "content": self._shield(turn["content"])} for turn in turns],
            columns=self._shield_values(problem.columns),
        )

    def restore(self, texts: list[str], token_ids: list[list[int]], add_special_tokens: bool) -> list[str]:
        """Return the texts without shields; the tokens of a text with shields are replaced in place."""
        if not self._rows:
            return texts
        before = added_tokens(self._tokenizer)[0] if add_special_tokens else []
        for index, text in enumerate(texts):
            parts = SHIELDED.split(text)  # text, number, text, number, ..., text
            if len(parts) > 1:
                ids = [
                    id_ for place, part in enumerate(parts) for id_ in self._encode_part(part, place % 2 == 1)
                ]
                token_ids[index] = ids if ids[: len(before)] == before else before + ids
        return [SHIELDED.sub(lambda found: self._found[int(found[1])], text) for text in texts]

    def warn(self) -> None:
        """Say how many rows there were."""
        if self._rows:
            place, name = self._rows[0]
            logger.warning(
                "%s: %d rows hold control tokens of the tokenizer, the first %s at %s; they are encoded as plain text. Where rows "
                "are prompts rendered beforehand set data.control_tokens=keep",
                self._key,
                len(self._rows),
                name,
                place,
            )

    def _encode_part(self, part: str, is_shield: bool) -> list[int]:
        text = self._found[int(part)] if is_shield else part
        options = {"add_special_tokens": False, "split_special_tokens": is_shield}
        return list(self._tokenizer(text, **options)["input_ids"]) if text else []

    def _shield(self, text: str) -> str:
        assert self._pattern is not None

        def numbered(found: re.Match[str]) -> str:
            self._found.append(found[0])
            return SHIELD.format(len(self._found) - 1)

        return self._pattern.sub(numbered, text)

    def _shield_values(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: self._shield(value) if isinstance(value, str) else value for name, value in columns.items()
        }
