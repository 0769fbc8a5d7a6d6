"""DeepSpeed training of the full-precision policy, and the source of the weight stream."""

from qurl.learner.group import LearnerDied, LearnerGroup
from qurl.learner.learner import Learner, NonFiniteLoss, StepResult
from qurl.learner.splitting import split_for_ranks

__all__ = ["Learner", "LearnerDied", "LearnerGroup", "NonFiniteLoss", "StepResult", "split_for_ranks"]
