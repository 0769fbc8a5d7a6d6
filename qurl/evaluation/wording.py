"""Checks that evaluation shares with training name a run's keys; here the same things have options of the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from qurl.errors import ConfigError

OPTIONS = {
    " (or evaluation's, or that of stages)": "",
    "raise it or set data.overlong_prompts=drop": "raise it",
    "remove them or name another column": "remove them",
    "; set rollout.stop_token_ids": "",
    "; the learner trains a full-precision one": "; --format encodes a full-precision one as it loads",
    "data.max_prompt_tokens": "--max-prompt-tokens",
    "data.prompt_template": "--prompt",
    "data.chat_template_kwargs.": "--chat-template-kwarg ",
    "data.chat_template_kwargs": "--chat-template-kwarg",
    "data.chat_template=true": "--chat-template",
    "data.chat_template=false": "--no-chat-template",
    "data.control_tokens=": "--control-tokens ",
    "model.path": "MODEL",
    "quantization.codebooks": "--codebooks",
    "quantization.ignore": "--ignore",
    "quantization.precision": "--precision",
    "quantization.rotation=": "--rotation ",
    "quantization.group_size=": "--group-size ",
    "quantization=": "--format ",
    "reward.function": "--reward",
    "reward.kwargs.": "--reward-arg ",
    "reward.kwargs": "--reward-arg",
    "rollout.engine_args.": "--engine-arg ",
    "rollout.max_response_tokens": "--max-tokens",
    "rollout.tensor_parallel_size": "--tensor-parallel-size",
}
"""What a message of a run says -> what the same message says here; in this order."""


@contextlib.contextmanager
def in_options() -> Iterator[None]:
    """A ValueError from inside leaves as a ConfigError in the words of `qurl eval`."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for key, option in OPTIONS.items():
            text = text.replace(key, option)
        raise ConfigError(text) from error
