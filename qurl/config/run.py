"""The whole run, and the groups that concern only the driver."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from qurl.config.algorithm import AlgorithmConfig
from qurl.config.data import DataConfig
from qurl.config.learner import LearnerConfig
from qurl.config.model import ModelConfig
from qurl.config.quantization import QuantizationConfig
from qurl.config.reward import RewardConfig
from qurl.config.rollout import RolloutConfig
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

    every_steps: int = 10  # 0: never
    at_start: bool = True
    num_samples_per_prompt: int = 1  # k of avg@k
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    max_response_tokens: int | None = None  # default: rollout.max_response_tokens


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
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
