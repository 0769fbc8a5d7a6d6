"""The critic of PPO."""

from __future__ import annotations

from dataclasses import dataclass, replace
from os.path import expanduser

from qurl.config.learner import LearnerConfig
from qurl.config.model import ModelConfig


@dataclass(kw_only=True, slots=True)
class CriticConfig:
    """The value function that algorithm.advantage.name=gae trains beside the policy. Whatever is not here is the learner's: ranks,
    ZeRO stage, dtype, mini-batches, the rest of the optimizer."""

    path: str | None = None  # folder or hub name of a causal language model; null: model.path
    revision: str | None = None  # of path
    learning_rate: float = 1e-5
    value_clip: float | None = 0.5  # largest change of a value within an iteration that pays; null: any. verl's cliprange_value
    num_warmup_iterations: int = 0  # the first so many train the critic alone; verl's critic_warmup

    def __post_init__(self) -> None:
        """A leading ~ is the home folder, as for model.path."""
        self.path = self.path and expanduser(self.path)

    def model(self, policy: ModelConfig) -> ModelConfig:
        """What the critic starts from."""
        if self.path is None:
            return policy
        return replace(policy, path=self.path, revision=self.revision, tokenizer=None, max_position_embeddings=None)

    def learner(self, policy: LearnerConfig) -> LearnerConfig:
        """How the critic is trained. What invariant scaling does to the policy does not concern it."""
        return replace(policy, learning_rate=self.learning_rate, scaled_layers_multiplier=1.0)
