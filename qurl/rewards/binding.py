"""One calling convention for the reward functions people write.

Ours is `(response, ground_truth, **extra) -> float`; a function without `**extra` receives those extras it names. verl's
`compute_score(data_source, solution_str, ground_truth, extra_info) -> float | dict` is recognized by its parameters. All
arguments are passed by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from qurl.config import RewardConfig
from qurl.types import Prompt

KEY = "reward.function"
Score = Callable[[str, Prompt], float]


def bind(function: Any, config: RewardConfig, is_builtin: bool) -> Score:
    """`function` as (response, prompt) -> finite float, with `config.kwargs` bound.

    is_builtin: its `**extra` takes nothing from `config.kwargs`. ValueError where the signature fits neither convention or a name
    in kwargs fits no parameter. The result raises TypeError or ValueError where the function returns no finite number."""
    label = f"{KEY}={config.function!r}"
    parameters = _parameters(function, label)
    text, truth = _roles(parameters, label)
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [k for k in config.kwargs if k in (text, truth) or k not in parameters and (is_builtin or not is_open)]
    if unknown:
        raise ValueError(
            f"reward.kwargs: {', '.join(unknown)} cannot be set on {label}, whose parameters are {', '.join(parameters)}"
        )

    def score(response: str, prompt: Prompt) -> float:
        extra = {"extra_info": prompt.extra} if text == "solution_str" else prompt.extra
        given = {**extra, "data_source": prompt.data_source, **config.kwargs, text: response, truth: prompt.ground_truth}
        return _finite(function(**{name: value for name, value in given.items() if is_open or name in parameters}))

    return score


def _parameters(function: Any, label: str) -> Mapping[str, inspect.Parameter]:
    if not callable(function):
        raise ValueError(f"{label} is a {type(function).__name__}, not a function")
    try:
        return inspect.signature(function).parameters
    except (ValueError, TypeError) as error:
        raise ValueError(f"{label} has no readable signature; wrap it in a function (response, ground_truth)") from error


def _roles(parameters: Mapping[str, inspect.Parameter], label: str) -> tuple[str, str]:
    """Names of the parameters that take the response and the ground truth: by name, else the first two whatever their names."""
    names = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for text in ("solution_str", "response"):
        if text in names and "ground_truth" in names:
            return text, "ground_truth"
    if len(names) < 2:
        signature = ", ".join(map(str, parameters.values()))
        raise ValueError(
            f"{label} has the signature ({signature}); use (response, ground_truth, **extra) or verl's "
            "(data_source, solution_str, ground_truth, extra_info)"
        )
    return names[0], names[1]


def _finite(result: Any) -> float:
    """The number a reward function returned, alone or as verl's {"score": number}."""
    value = result["score"] if isinstance(result, Mapping) and "score" in result else result
    if not isinstance(value, Real):
        raise TypeError(f"the reward function returned {type(value).__name__} {str(value)[:80]!r}, not a number")
    if not math.isfinite(value):
        raise ValueError(f"the reward function returned {value}, not a finite number")
    return float(value)
