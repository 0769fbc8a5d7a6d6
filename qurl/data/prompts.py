"""Problems rendered and tokenized. The template makes the user turn of a problem; the tokenizer's chat template, where asked for,
makes the whole prompt of it."""

from __future__ import annotations

import logging
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qurl.config import DataConfig, OverlongPrompts
from qurl.data.problems import Problem
from qurl.types import Prompt

logger = logging.getLogger(__name__)

NUM_ROUND_TRIPS = 8  # prompts whose tokens are decoded again and compared


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """Prompts of a dataset in row order, with `prompt_id` "r000017" for row 17."""

    prompts: list[Prompt]
    num_dropped: int  # longer than max_prompt_tokens


def build_prompts(problems: Sequence[Problem], tokenizer: Any, config: DataConfig, key: str) -> PromptSet:
    """Render and tokenize `problems`.

    tokenizer: a Hugging Face tokenizer. key: where the dataset stands in the configuration, e.g. "data.train". Without the chat
    template the tokenizer adds its own special tokens; with it, the template has written them. ValueError for a template that
    does not fit, a tokenizer that loses text, and prompts over `data.max_prompt_tokens` where they are refused or all there are."""
    _check_options(tokenizer, config)
    texts = [_render(problem, tokenizer, config, key) for problem in problems]
    token_ids = tokenizer(texts, add_special_tokens=not config.chat_template)["input_ids"]
    _check_round_trip(texts[:NUM_ROUND_TRIPS], token_ids[:NUM_ROUND_TRIPS], tokenizer, key)
    prompts = []
    for problem, text, ids in zip(problems, texts, token_ids, strict=True):
        if not ids:
            raise ValueError(f"{key} {problem.place}: the tokenizer encodes the prompt to no token: {text[:80]!r}")
        if len(ids) <= config.max_prompt_tokens:
            prompts.append(Prompt(
                prompt_id=f"r{problem.row:06d}", token_ids=list(ids), text=text, ground_truth=problem.answer,
                data_source=problem.data_source, extra=problem.extra,
            ))  # fmt: skip
        elif config.overlong_prompts is OverlongPrompts.error:
            raise ValueError(
                f"{key} {problem.place}: the prompt has {len(ids)} tokens, data.max_prompt_tokens={config.max_prompt_tokens}; "
                "raise it or set data.overlong_prompts=drop"
            )
    if not prompts:
        shortest = min(map(len, token_ids), default=0)
        raise ValueError(
            f"{key}: none of {len(problems)} prompts has at most data.max_prompt_tokens={config.max_prompt_tokens} tokens; "
            f"the shortest has {shortest}"
        )
    num_dropped = len(problems) - len(prompts)
    if num_dropped:
        logger.warning("%s: dropped %d of %d prompts over %d tokens", key, num_dropped, len(problems), config.max_prompt_tokens)
    return PromptSet(prompts=prompts, num_dropped=num_dropped)


def _check_options(tokenizer: Any, config: DataConfig) -> None:
    if config.max_prompt_tokens < 1:
        raise ValueError(f"data.max_prompt_tokens={config.max_prompt_tokens} leaves no prompt; use at least 1")
    if config.chat_template and not tokenizer.chat_template:
        raise ValueError("data.chat_template=true, but the tokenizer has no chat template; set it to false")
    if config.system_prompt is not None and not config.chat_template:
        raise ValueError("data.system_prompt needs data.chat_template=true; or write it into data.prompt_template")
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(config.prompt_template) if field is not None]
    except ValueError as error:
        raise _template_error(config.prompt_template, str(error)) from error
    if not fields:
        raise _template_error(config.prompt_template, "it names no column, so all prompts would be the same")


def _template_error(template: str, reason: str) -> ValueError:
    return ValueError(
        f"data.prompt_template={template!r}: {reason}; "
        "{problem} is the problem, {column} any column of the row, and literal braces are doubled: \\boxed{{}}"
    )


def _render(problem: Problem, tokenizer: Any, config: DataConfig, key: str) -> str:
    is_filled = problem.messages is not None and _is_filled(problem.text, config.prompt_template)
    user_turn = problem.text if is_filled else _fill(problem, config.prompt_template, key)
    if not config.chat_template:
        if problem.messages and len(problem.messages) > 1:
            raise ValueError(f"{key} {problem.place}: a chat of {len(problem.messages)} turns needs data.chat_template=true")
        return user_turn
    history = problem.messages[:-1] if problem.messages else []
    if config.system_prompt is not None:
        if history and history[0]["role"] == "system":
            raise ValueError(f"{key} {problem.place}: the row has a system turn of its own; unset data.system_prompt")
        history = [{"role": "system", "content": config.system_prompt}, *history]
    from jinja2 import TemplateError

    try:
        chat = [*history, {"role": "user", "content": user_turn}]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"{key} {problem.place}: the tokenizer's chat template refuses the chat: {error}") from error


def _is_filled(text: str, template: str) -> bool:
    """The last turn of a chat already begins and ends as the template does: verl's data sets are stored with their prompt."""
    literals = [literal for literal, _, _, _ in string.Formatter().parse(template)]
    begin, end = literals[0], literals[-1]
    return len(literals) > 1 and bool(begin) and bool(end) and text.startswith(begin) and text.endswith(end)


def _fill(problem: Problem, template: str, key: str) -> str:
    """The user turn. `{problem}` is always the problem's text, whatever the column it came from is called."""
    fields = {**problem.columns, "problem": problem.text}
    try:
        return template.format(**fields)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        found = f"{type(error).__name__} {error} at {key} {problem.place}, which has {', '.join(fields)}"
        raise _template_error(template, found) from error


def _check_round_trip(texts: Sequence[str], token_ids: Sequence[Sequence[int]], tokenizer: Any, key: str) -> None:
    """ValueError where decoding the tokens does not give the text back. A tokenizer of the wrong class may encode every text to
    nothing without an error. Spaces, case and Unicode compatibility forms, which normalizers change, are not compared."""
    for text, ids in zip(texts, token_ids, strict=True):
        decoded = tokenizer.decode(ids)
        if _essence(text) not in _essence(decoded):  # special tokens may surround it
            raise ValueError(
                f"{key}: the tokenizer {type(tokenizer).__name__} loses text: {text[:60]!r} becomes {len(ids)} tokens that read "
                f"{decoded[:60]!r}; check model.tokenizer"
            )


def _essence(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
