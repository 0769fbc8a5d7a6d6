"""Structured configuration: one dataclass per group, defaults written once, here."""

from qurl.config.algorithm import (
    AdvantageConfig,
    Aggregation,
    AlgorithmConfig,
    CorrectionConfig,
    DynamicSamplingConfig,
    KLConfig,
    KLEstimator,
    KLPlacement,
    OverlongConfig,
    PolicyLossConfig,
    Rejection,
)
from qurl.config.critic import CriticConfig
from qurl.config.data import ControlTokens, DataConfig, DatasetConfig, OverlongPrompts
from qurl.config.guard import GuardAction, GuardConfig
from qurl.config.learner import LearnerConfig, LearnerDtype
from qurl.config.model import ModelConfig
from qurl.config.probe import ProbeConfig
from qurl.config.quantization import QuantizationConfig, UpdateAwareness
from qurl.config.reward import RewardConfig, Unpayable
from qurl.config.rollout import RolloutConfig, StageConfig
from qurl.config.run import CheckpointConfig, ClusterConfig, Device, EvaluationConfig, LoggingConfig, TrainConfig, WandbMode
from qurl.config.sync import SyncConfig

__all__ = [
    "AdvantageConfig", "Aggregation", "AlgorithmConfig", "CheckpointConfig", "ClusterConfig", "CorrectionConfig",
    "ControlTokens", "CriticConfig",
    "DataConfig", "DatasetConfig", "Device", "DynamicSamplingConfig", "EvaluationConfig", "GuardAction",
    "GuardConfig", "KLConfig", "KLEstimator", "KLPlacement", "LearnerConfig", "LearnerDtype", "LoggingConfig", "ModelConfig",
    "OverlongConfig", "OverlongPrompts", "PolicyLossConfig", "ProbeConfig", "QuantizationConfig", "Rejection", "RewardConfig",
    "RolloutConfig", "StageConfig", "SyncConfig", "TrainConfig", "Unpayable", "UpdateAwareness", "WandbMode",
]
