"""Problems rendered and tokenized. The template makes the user turn of a problem; the tokenizer's chat template, where asked for,
makes the whole prompt of it."""

from __future__ import annotations

import difflib
import logging
import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qurl.config import DataConfig, OverlongPrompts
from qurl.data.control_tokens import ControlTokenGuard, encode
from qurl.data.problems import Problem
from qurl.types import Prompt

logger = logging.getLogger(__name__)

OWN_ARGUMENTS = {
    "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "messages",
}
"""Arguments of a tokenizer's apply_chat_template that are no variables of the template, or not the user's."""

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
    guard = ControlTokenGuard(tokenizer, config.control_tokens, key)
    texts = [_render(problem, tokenizer, config, key, guard) for problem in problems]
    token_ids = encode(texts, tokenizer, add_special_tokens=not config.chat_template)
    texts = guard.restore(texts, token_ids, not config.chat_template)
    guard.warn()
    _check_round_trip(texts[:NUM_ROUND_TRIPS], token_ids[:NUM_ROUND_TRIPS], tokenizer, key)
    prompts = []
    for problem, text, ids in zip(problems, texts, token_ids, strict=True):
        if not ids:
            raise ValueError(f"{key} {problem.place}: the tokenizer encodes the prompt to no token: {text[:80]!r}")
        if len(ids) <= config.max_prompt_tokens:
            prompts.append(Prompt(
                prompt_id=f"r{problem.row:06d}", token_ids=list(ids), text=text, ground_truth=problem.answer, truth=problem.truth,
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
    _check_kwargs(tokenizer, config)
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


def _check_kwargs(tokenizer: Any, config: DataConfig) -> None:
    """Refuse variables that the chat template would ignore, and those that are set here."""
    if config.chat_template_kwargs and not config.chat_template:
        raise ValueError("data.chat_template_kwargs needs data.chat_template=true; or leave it out")
    for name in config.chat_template_kwargs:
        if name in OWN_ARGUMENTS:
            raise ValueError(f"data.chat_template_kwargs.{name} is set by qurl itself; remove it")
        template = tokenizer.chat_template
        text = " ".join(template.values()) if isinstance(template, dict) else str(template)
        if not re.search(rf"\b{re.escape(name)}\b", text):
            words = set(re.findall(r"[A-Za-z_]\w+", " ".join(re.findall(r"\{[{%].*?[%}]\}", text, re.DOTALL))))
            near = difflib.get_close_matches(name, sorted(words), n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; remove it"
            raise ValueError(f"data.chat_template_kwargs.{name}: the tokenizer's chat template reads no such variable{hint}")


def _template_error(template: str, reason: str) -> ValueError:
    return ValueError(
        f"data.prompt_template={template!r}: {reason}; "
        "{problem} is the problem, {column} any column of the row, and literal braces are doubled: \\boxed{{}}"
    )


def _render(problem: Problem, tokenizer: Any, config: DataConfig, key: str, guard: ControlTokenGuard) -> str:
    problem = guard.shielded(problem)
    is_filled = _is_filled(problem, config.prompt_template)
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
    chat = [*history, {"role": "user", "content": user_turn}]
    try:
        rendered = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, **config.chat_template_kwargs
        )
    except Exception as error:  # trust boundary: a template is a program that comes with the model
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{key} {problem.place}: the tokenizer's chat template fails ({reason}); set data.chat_template=false, or mend the "
            "template or data.chat_template_kwargs"
        ) from error
    if not isinstance(rendered, str):
        raise ValueError(f"{key} {problem.place}: the tokenizer's chat template made a {type(rendered).__name__}, not text")
    return rendered


INSTRUCTION = re.compile(r"step[ -]by[ -]step|\\boxed\s*\{\s*\}|[\"'`]####[\"'`]|Answer: \$Answer", re.IGNORECASE)
"""What the instructions of verl's data sets, and ours, have in common."""
NUM_END_CHARACTERS = 300  # of a chat's user turn in which an instruction is looked for


def _is_filled(problem: Problem, template: str) -> bool:
    """Return whether the user turn already holds an instruction: rows of verl are stored with their prompt.

    Such is a text that begins and ends as the template does, spaces aside, or a chat whose last turn begins or ends with an
    instruction of another wording."""
    begin, end, seen = "", "", False
    for literal, field, _, _ in string.Formatter().parse(template):
        begin, end = (begin, end + literal) if seen else (begin + literal, "")
        if field is not None:
            seen, end = True, ""
    text, begin, end = (" ".join(part.split()) for part in (problem.text, begin, end))
    if any(character.isalpha() for character in begin + end) and text.startswith(begin) and text.endswith(end):
        return True
    has_own = INSTRUCTION.search(text[-NUM_END_CHARACTERS:]) or INSTRUCTION.search(text[:NUM_END_CHARACTERS])
    return problem.messages is not None and template.strip() != "{problem}" and bool(has_own)


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
