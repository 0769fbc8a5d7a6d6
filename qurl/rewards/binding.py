"""One calling convention for the reward functions people write: parameters are matched by name.

    def reward(response, ground_truth, extra_info): ...                            # ours
    def compute_score(data_source, solution_str, ground_truth, extra_info): ...    # verl's, as it is
    def reward(prompt, completion, answer, difficulty=1): ...                      # `difficulty` is a column of the row

One parameter takes the response and one the ground truth, under any of the names below. Every other parameter receives the
column of that name, `extra_info` all of them. Names that do not decide are refused: the wrong order would train on noise."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from qurl.config import RewardConfig
from qurl.types import Prompt

KEY = "reward.function"
Score = Callable[..., "Scored"]  # (response, prompt, finish_reason="stop")

RESPONSE_NAMES = (
    ("response", "completion", "solution_str"),
    ("text", "output", "prediction", "pred", "generation", "generated_text", "model_output", "response_str", "completion_str"),
)
TRUTH_NAMES = (
    ("ground_truth",),
    ("answer", "label", "target", "gold", "gold_answer", "reference", "expected", "truth", "correct_answer", "solution"),
)
"""Names of either role, those that leave no doubt first: `answer` is the truth beside `response`, and an extra beside both."""
SIGNATURES = "(response, ground_truth, **extra) or verl's (data_source, solution_str, ground_truth, extra_info)"


class Scored(float):
    """A finite score, with the other numbers that a reward function returned beside it."""

    parts: dict[str, float]


def bind(function: Any, config: RewardConfig, is_builtin: bool) -> Score:
    """Return `function` as (response, prompt, finish_reason) -> score, with `config.kwargs` bound.

    is_builtin: its `**extra` takes nothing from `config.kwargs`, and it never sees the row's columns. ValueError where names do
    not say which parameter takes the response and which the ground truth, or where a name in kwargs fits no parameter. The result
    raises TypeError or ValueError where the function returns no finite number."""
    label = f"{KEY}={config.function!r}"
    parameters = _parameters(function, label)
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    text, truth = _roles(names, is_open, f"{label} has the signature ({', '.join(map(str, parameters.values()))})")
    unknown = [k for k in config.kwargs if k in (text, truth) or k not in names and (is_builtin or not is_open)]
    if unknown:
        raise ValueError(
            f"reward.kwargs: {', '.join(unknown)} cannot be set on {label}, whose parameters are {', '.join(parameters)}"
        )

    always = {text, truth, "data_source", *config.kwargs, *(("extra_info",) if text == "solution_str" else ())}

    def score(response: str, prompt: Prompt, finish_reason: str = "stop") -> Scored:
        stored = prompt.ground_truth if is_builtin or prompt.truth is None else prompt.truth
        row = {"prompt": prompt.text, "prompt_id": prompt.prompt_id, **({} if is_builtin else prompt.extra)}
        context = {"data_source": prompt.data_source, "extra_info": prompt.extra, "finish_reason": finish_reason}
        given = {**row, **context, **config.kwargs, text: response, truth: stored}
        unnamed = always | (set() if is_builtin else prompt.extra.keys()) if is_open else set()
        result = function(**{name: value for name, value in given.items() if name in names or name in unnamed})
        return _parts(asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result)

    return score


async def _awaited(result: Any) -> Any:
    return await result


def _parameters(function: Any, label: str) -> Mapping[str, inspect.Parameter]:
    if not callable(function):
        raise ValueError(f"{label} is a {type(function).__name__}, not a function")
    try:
        return inspect.signature(function).parameters
    except (ValueError, TypeError) as error:
        raise ValueError(f"{label} has no readable signature; wrap it in a function (response, ground_truth)") from error


def _roles(names: list[str], is_open: bool, label: str) -> tuple[str, str]:
    """Return the names of the parameters that take the response and the ground truth.

    A function with `**extra` receives a role that no parameter names under qurl's own name of it. ValueError where the names
    leave a choice."""
    text, truth = _named(names, RESPONSE_NAMES, label), _named(names, TRUTH_NAMES, label)
    if text is None and truth == "ground_truth" and not is_open:  # (answer, ground_truth): only one can be the response
        text = _named([name for name in names if name != truth], TRUTH_NAMES[1:], label)
    if is_open and truth:  # `**extra` alone decides nothing, but it may take the other role
        text = text or "response"
    elif is_open and text:
        truth = "ground_truth"
    if text is None or truth is None:
        lists = ", for one response and not for a list of completions" if "completions" in names else ""
        missing = " and ".join(role for role, name in (("response", text), ("ground truth", truth)) if name is None)
        raise ValueError(f"{label}, whose names do not say which parameter takes the {missing}; use {SIGNATURES}{lists}")
    return text, truth


def _named(names: list[str], levels: tuple[tuple[str, ...], ...], label: str) -> str | None:
    for level in levels:
        found = [name for name in names if name in level]
        if len(found) > 1:
            raise ValueError(f"{label}, in which {' and '.join(found)} could each be meant; use {SIGNATURES}")
        if found:
            return found[0]
    return None


def _parts(result: Any) -> Scored:
    """Return the score a reward function returned, with the other numbers where it returned a dict of parts.

    The score of a dict is `score`, as in verl; what is no number among the others is left out."""
    if not isinstance(result, Mapping):
        return _scored(_finite(result), {})
    if "score" not in result:
        raise TypeError(f"the reward function returned a dict of {', '.join(map(str, result)) or 'nothing'} without a score")
    parts = {str(key): _number(value) for key, value in result.items() if key != "score"}
    return _scored(_finite(result["score"]), {k: value for k, value in parts.items() if value is not None and math.isfinite(value)})


def _scored(value: float, parts: dict[str, float]) -> Scored:
    score = Scored(value)
    score.parts = parts
    return score


def _finite(value: Any) -> float:
    number = _number(value)
    if number is None:
        raise TypeError(f"the reward function returned {type(value).__name__} {str(value)[:80]!r}, not a number")
    if not math.isfinite(number):
        raise ValueError(f"the reward function returned {value}, not a finite number")
    return number


def _number(value: Any) -> float | None:
    """Return `value` as a float where it is a number, a truth value or an array of one of them, of any library; else None."""
    if isinstance(value, str | bytes | bytearray) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        return float(value) if type(value).__name__ in ("bool_", "bool") else None  # numpy's truth values are no numbers
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
