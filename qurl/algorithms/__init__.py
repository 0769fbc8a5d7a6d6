"""The objective as pure tensor math: advantages, mismatch correction, policy loss, KL, aggregation. Needs torch only.

    weight * min(R * A, clip(R, 1 - clip_low, (1 + clip_high) * clip_high_scale) * A)        R = pi / pi_base

Corrections fill weight, clip_high_scale and pi_base; the tables below are the plug points, and `qurl.plug.resolve` also takes
`package.module:attribute`."""

from qurl.algorithms.advantages import ADVANTAGES, RewardedGroup, grpo
from qurl.algorithms.aggregation import token_weights
from qurl.algorithms.corrections import CORRECTIONS, Correction, CorrectionInputs
from qurl.algorithms.gae import gae
from qurl.algorithms.kl import kl_penalty
from qurl.algorithms.mismatch import mismatch_metrics, mismatch_parts
from qurl.algorithms.policy_losses import POLICY_LOSSES, LossOutput, PolicyLossInputs, ppo_clip
from qurl.algorithms.sequences import last_trained, sequence_means, sequence_sums
from qurl.algorithms.value_loss import clipped_value_loss

__all__ = [
    "ADVANTAGES", "CORRECTIONS", "POLICY_LOSSES", "Correction", "CorrectionInputs", "LossOutput", "PolicyLossInputs",
    "RewardedGroup", "clipped_value_loss", "gae", "grpo", "kl_penalty", "last_trained", "mismatch_metrics", "mismatch_parts",
    "ppo_clip", "sequence_means", "sequence_sums", "token_weights",
]
