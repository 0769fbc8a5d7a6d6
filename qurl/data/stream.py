"""The order in which a run sees its prompts: epoch after epoch without end, each epoch a permutation of its own.

The order is a function of the seed and the epoch alone, so a position is two integers and a resumed run continues at the very
prompt where the other stopped, in the middle of a batch or at the border of two epochs."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from qurl.types import Prompt


class PromptStream:
    """Endless, seeded, resumable. A prompt of epoch 2 has the id "e2-<id in the set>": unique, and the same in every run."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool) -> None:
        """prompts: with unique ids, at least one; ValueError otherwise. shuffle: False keeps their order in every epoch."""
        if not prompts:
            raise ValueError("a prompt stream needs at least one prompt")
        if len({prompt.prompt_id for prompt in prompts}) != len(prompts):
            raise ValueError("a prompt stream needs prompts with unique ids")
        self._prompts = prompts
        self._identity = {"num_prompts": len(prompts), "seed": seed, "shuffle": shuffle}
        with warnings.catch_warnings():  # torchdata 0.11 calls a function that torch 2.13 has deprecated
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            # a generator of its own: the loader draws a number from the global one each time it is iterated
            self._loader: StatefulDataLoader = StatefulDataLoader(
                _EpochPrompts(prompts), batch_size=None, sampler=_EndlessSampler(len(prompts), seed, shuffle),
                num_workers=0, generator=torch.Generator(),
            )  # fmt: skip
        self._iterator = iter(self._loader)

    def first(self, num_prompts: int) -> Sequence[Prompt]:
        """The set's first prompts, in its own order; the position stays as it is."""
        return self._prompts[:num_prompts]

    def take(self, num_prompts: int) -> list[Prompt]:
        """The next `num_prompts` prompts; more than one epoch where the set is smaller."""
        return list(islice(self._iterator, num_prompts))

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON-serializable values."""
        return {**self._identity, "loader": self._loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. ValueError where it belongs to other prompts, another seed or another order."""
        for name, value in self._identity.items():
            if state[name] != value:
                raise ValueError(
                    f"the saved data position has {name}={state[name]}, this run has {value}; resume with the same data, "
                    "data.shuffle and seed, or start a new run"
                )
        self._loader.load_state_dict(state["loader"])
        self._iterator = iter(self._loader)


class _EpochPrompts(Dataset):
    """(epoch, row) -> the prompt under its id in that epoch."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts

    def __getitem__(self, index: tuple[int, int]) -> Prompt:
        epoch, row = index
        prompt = self._prompts[row]
        return replace(prompt, prompt_id=f"e{epoch}-{prompt.prompt_id}")


class _EndlessSampler(Sampler[tuple[int, int]]):
    """(epoch, row) pairs; its own iterator, because the position is its state."""

    def __init__(self, num_rows: int, seed: int, shuffle: bool) -> None:
        self._num_rows, self._seed, self._shuffle = num_rows, seed, shuffle
        self._epoch, self._position = 0, 0
        self._order = self._order_of(0)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self

    def __next__(self) -> tuple[int, int]:
        if self._position == self._num_rows:
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        self._position += 1
        return self._epoch, self._order[self._position - 1]

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(self._num_rows))
        if self._shuffle:
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._order_of(self._epoch)
