"""The whole run, and the groups that concern only the driver."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from qurl.config.algorithm import AlgorithmConfig
from qurl.config.critic import CriticConfig
from qurl.config.data import DataConfig
from qurl.config.guard import GuardConfig
from qurl.config.learner import LearnerConfig
from qurl.config.model import ModelConfig
from qurl.config.probe import ProbeConfig
from qurl.config.quantization import QuantizationConfig
from qurl.config.reward import RewardConfig
from qurl.config.rollout import RolloutConfig, StageConfig
from qurl.config.sync import SyncConfig


class Device(Enum):
    """Where engines and learners run."""

    auto = "auto"  # cuda where torch sees one
    cpu = "cpu"
    cuda = "cuda"


class WandbMode(Enum):
    """wandb's own modes."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out accuracy during training, sampled from the rollout engines."""

    every_steps: int = 10  # iterations between two evaluations, and one after the last; 0: none, also not after the last
    at_start: bool = True  # one before the first iteration, whatever every_steps is
    num_samples_per_prompt: int = 1  # k of avg@k
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    max_response_tokens: int | None = None  # default: the largest rollout.max_response_tokens of all stages

    def is_due(self, completed: int, num_steps: int) -> bool:
        """Whether an evaluation belongs after `completed` of `num_steps` iterations."""
        if completed == 0:
            return self.at_start
        return self.every_steps > 0 and (completed % self.every_steps == 0 or completed == num_steps)


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When state is written."""

    every_steps: int = 20  # 0: only at the end and on Ctrl-C
    keep_last: int = 2


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Ray, devices and threads."""

    address: str | None = None  # Ray address; None starts a local Ray
    device: Device = Device.auto
    colocate: bool = False  # engines and learner ranks share the GPUs (CUDA IPC weight sync)
    engine_threads: int = 0  # OpenMP threads of an engine on the CPU; 0: from the cores and max_staleness
    learner_threads: int = 0
    stall_timeout_s: float = 600.0


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What a person sees."""

    console: bool = True
    num_rollouts_per_step: int = 4  # written to rollouts/
    wandb: WandbMode = WandbMode.disabled
    wandb_project: str = "qurl"
    wandb_entity: str | None = None


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Everything `qurl train` reads; saved resolved as <output_dir>/<run_name>/config.yaml."""

    run_name: str = "run"
    output_dir: str = "runs"
    seed: int = 0
    num_steps: int = 100  # training iterations
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    stages: list[StageConfig] = field(default_factory=list)  # later numbers of rollout, in order of from_step
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def stage_at(self, step: int) -> int:
        """0 before the first of `stages`, i from stages[i - 1].from_step on."""
        return sum(stage.from_step <= step for stage in self.stages)

    def rollout_of_stage(self, stage: int) -> RolloutConfig:
        """rollout under the first `stage` of `stages`."""
        rollout = self.rollout
        for begun in self.stages[:stage]:
            rollout = begun.apply(rollout)
        return rollout

    def rollout_at(self, step: int) -> RolloutConfig:
        """rollout of iteration `step`."""
        return self.rollout_of_stage(self.stage_at(step))

    @property
    def longest_rollout_tokens(self) -> int:
        """Largest max_response_tokens of all stages: what an evaluation samples by default."""
        return max(self.rollout_of_stage(stage).max_response_tokens for stage in range(len(self.stages) + 1))

    @property
    def longest_tokens(self) -> int:
        """Of a prompt and its response, in training and evaluation: what the engines hold from the start."""
        return self.data.max_prompt_tokens + max(self.longest_rollout_tokens, self.evaluation.max_response_tokens or 0)
