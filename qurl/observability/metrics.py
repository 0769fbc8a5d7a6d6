"""Typed metrics, reduced once by the driver, and the one table of keys.

A part of qurl returns `dict[str, Metric]`; the driver reduces what several ranks, engines or mini-batches reported to one float
per key. The type says how: a mean keeps its weight, so means over unequal shares stay exact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """A reported value; use one of the subclasses."""

    value: float


@dataclass(frozen=True, slots=True)
class Mean(Metric):
    """Averaged with `weight` (the number of tokens, samples, ... the value is a mean over)."""

    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class EffectiveSampleSize(Metric):
    """The fraction (sum w)^2 / (n sum w^2) over n weights; joined exactly, as a mean of fractions would depend on the split."""

    mean: float  # of the weights
    count: float  # n

    @classmethod
    def of(cls, mean: float, mean_square: float, count: float) -> EffectiveSampleSize:
        """From the mean of the weights and of their squares; the fraction of no weights is 0."""
        return cls(mean * mean / mean_square if mean_square else 0.0, mean, count)


@dataclass(frozen=True, slots=True)
class Sum(Metric):
    """Added up."""


@dataclass(frozen=True, slots=True)
class Max(Metric):
    """The largest wins."""


@dataclass(frozen=True, slots=True)
class Min(Metric):
    """The smallest wins."""


@dataclass(frozen=True, slots=True)
class Last(Metric):
    """The last report wins."""


METRICS: dict[str, str] = {
    "reward/mean": "mean reward of the iteration's rollouts, errors excluded",
    "reward/std_in_group": "mean over groups of the standard deviation of their rewards",
    "reward/error_count": "reward calls that raised, hung or returned a non-finite number",
    "reward/informative_group_fraction": "groups whose rewards are not all equal",
    "reward/overlong_penalty_mean": "mean length penalty added to the rewards, <= 0; only with algorithm.overlong.penalty_tokens",
    "accuracy/train": "rollouts with reward > 0, or with acc > 0 where a reward returns verl's dict with `acc`",
    "policy/loss": "policy loss, token-weighted",
    "policy/kl_loss": "KL term to the reference policy, before its coefficient",
    "policy/kl_reward": "estimate of KL(old || reference), nats per token, where it is placed in the reward",
    "policy/entropy": "mean entropy of the full-precision policy, nats per token; where top_p or top_k cut, of what they left",
    "policy/grad_norm": "global gradient norm before clipping, mean over optimizer steps",
    "policy/learning_rate": "learning rate of the last optimizer step",
    "policy/clip_high_fraction": "tokens cut by the upper clip bound; with cispo, whose ratio it bounds",
    "policy/clip_low_fraction": "tokens cut by the lower clip bound; with cispo, whose ratio it bounds",
    "policy/dual_clip_fraction": "tokens with A < 0 cut by dual_clip; only where it is set",
    "policy/kl_old_current": "k3 estimate of KL(base || current), nats per token; base is old, with correction naive it is rollout",
    "policy/num_optimizer_steps": "optimizer steps of the iteration",
    "policy/num_skipped_mini_batches": "mini-batches whose advantages were all 0: their optimizer step has a gradient of "
    "zero, without forward and backward; entropy, mismatch and tokens are then those of one micro-batch on each rank",
    "policy/tokens": "trained tokens of the iteration",
    "policy/padding_fraction": "padding in the packed micro-batches",
    "critic/loss": "clipped value loss, mean over trained tokens; all of critic/ only with algorithm.advantage.name=gae",
    "critic/clip_fraction": "tokens whose value moved further than critic.value_clip in an iteration and thus has no gradient",
    "critic/value_mean": "mean value before the update",
    "critic/explained_variance": "1 - var(returns - values) / var(returns) before the update; 0 where all returns are equal",
    "critic/grad_norm": "global gradient norm of the critic before clipping, mean over optimizer steps",
    "critic/learning_rate": "learning rate of the critic's last optimizer step",
    "mismatch/kl_rollout_old": "k3 estimate of KL(rollout || old), nats per token; where top_p or top_k cut, of what they left",
    "mismatch/ratio_max": "largest pi_old / pi_rollout of a token",
    "mismatch/ratio_mean": "mean pi_old / pi_rollout",
    "mismatch/abs_logprob_diff": "mean |log pi_old - log pi_rollout|",
    "mismatch/truncated_fraction": "tokens with pi_old / pi_rollout > truncation",
    "mismatch/ess_fraction": "effective sample size of the weights min(pi_old / pi_rollout, truncation) over the number of tokens",
    "mismatch/rejected_fraction": "tokens left out of the loss by the correction's rejection rule; only where there is one",
    "mismatch/quantization_kl": "k3 of what quantized arithmetic does to the policy; with probe, as the next ones. See "
    "qurl.algorithms.mismatch_parts",
    "mismatch/quantization_ratio_max": "largest pi_old / pi_q of a probed token",
    "mismatch/quantization_log_ratio": "mean log pi_q - log pi_old",
    "mismatch/engine_kl": "k3 of what else the engine does otherwise than the learner; over samples of the current weights",
    "mismatch/engine_kl_floor": "k3 between two forwards in the engines' arithmetic whose embeddings differ by a rounding: what "
    "engine_kl is at least where engine and learner compute the same function",
    "mismatch/engine_log_ratio": "mean log pi_rollout - log pi_q over them",
    "mismatch/staleness_kl": "k3 of engine and older weights together; over samples of older weights",
    "mismatch/staleness_log_ratio": "mean log pi_rollout - log pi_q over them",
    "acr/widened_fraction": "tokens whose upper clip bound ACR widened",
    "acr/changed_fraction": "tokens whose gradient ACR changed against TIS (A > 0 and R between the two bounds)",
    "acr/changed_gradient_fraction": "share of those tokens in the sum of |weight A R| over tokens with a gradient",
    "quantization/sqnr_min_db": "worst signal-to-quantization-noise ratio of a weight matrix, dB",
    "quantization/update_to_noise_min": "smallest |W_t - W_(t-1)| / |W - decode(encode(W))| of a matrix; with sync.track_updates",
    "quantization/update_to_noise_mean": "mean of it over the quantized matrices",
    "sync/encode_s": "encoding on the learner, slowest rank",
    "sync/transfer_s": "moving buckets, slowest rank",
    "sync/install_s": "verifying and installing, slowest engine",
    "sync/bytes": "bytes of one weight update, per engine",
    "sync/changed_code_fraction": "quantized codes that differ from the previous version",
    "sync/retry_count": "weight updates sent again to an engine that rejected one",
    "sync/weight_version": "version that the pool samples from",
    "rollout/tokens_per_s": "sampled tokens per second of rollout time",
    "rollout/num_tokens": "sampled tokens",
    "rollout/response_length_mean": "tokens per response",
    "rollout/response_length_max": "tokens of the longest response",
    "rollout/truncated_fraction": "responses cut at max_response_tokens",
    "rollout/kept_tokens_mean": "tokens that rollout.top_p and top_k left to draw from, per sampled token; only where they cut",
    "rollout/repetition_fraction": "responses that end in a loop: 64 tokens with a period of at most 16",
    "rollout/filtered_fraction": "truncated responses left out of the loss; only with algorithm.overlong.filter",
    "rollout/fallback": "1 while the pool samples as guard.action says; only with full_precision and raise_precision",
    "rollout/stage": "entries of `stages` that have begun; only where there are any",
    "rollout/num_generations": "batches sampled for the iteration; only with dynamic sampling, as the next two",
    "rollout/num_trained_groups": "groups trained",
    "rollout/discarded_fraction": "sampled groups that were not trained: uninformative, or more than needed",
    "rollout/staleness_max": "largest number of weight versions between sampling and training",
    "rollout/redispatched_count": "prompts dispatched again after an engine was lost",
    "rollout/engine_restart_count": "engines replaced since the start of the run",
    "time/step_s": "wall time of the iteration",
    "time/rollout_s": "waiting for rollouts",
    "time/reward_s": "waiting for rewards after the last rollout of the batch arrived",
    "time/probe_s": "two forwards over the probed samples",
    "time/logprob_s": "old and reference logprobs, values",
    "time/update_s": "forward, backward, optimizer, of policy and critic",
    "time/sync_s": "weight update, first byte to last commit",
    "time/eval_s": "evaluation",
    "time/checkpoint_s": "writing the checkpoint of the iteration before",
    "time/idle_s": "the rest: orchestration",
}
"""Every key an iteration may log. Evaluations add `eval/<dataset>/` avg_at_k, response_length_mean, error_count and, with several
samples per prompt, pass_at_k and maj_at_k; sync.track_updates adds `quantization/update_to_noise/<module>`; a reward that
returns a dict adds the mean of each number beside its score as `reward/<name>`."""

FAMILIES = ("eval/", "quantization/update_to_noise/", "reward/")
"""What keys begin with whose end depends on the run."""


def check_key(key: str) -> None:
    """Raises KeyError for a key that is not in the table."""
    if key not in METRICS and not key.startswith(FAMILIES):
        raise KeyError(f"metric {key!r} is not in qurl.observability.metrics.METRICS; add it there with a description")


def reduce_metrics(reports: Iterable[Mapping[str, Metric]]) -> dict[str, float]:
    """One float per key over all reports. A key reported with two types raises TypeError; an unknown key, KeyError."""
    found: dict[str, list[Metric]] = {}
    for report in reports:
        for key, metric in report.items():
            check_key(key)
            found.setdefault(key, []).append(metric)
    return {key: _reduce(key, metrics) for key, metrics in found.items()}


def _reduce(key: str, metrics: list[Metric]) -> float:
    kinds = {type(m) for m in metrics}
    if len(kinds) != 1:
        raise TypeError(f"metric {key!r} is reported as {sorted(k.__name__ for k in kinds)}; use one type")
    values = [m.value for m in metrics]
    first = metrics[0]
    if isinstance(first, Mean):
        weight = sum(m.weight for m in metrics if isinstance(m, Mean))
        if weight == 0:
            return 0.0
        return sum(m.value * m.weight for m in metrics if isinstance(m, Mean)) / weight
    if isinstance(first, EffectiveSampleSize):
        return _join_sample_sizes([m for m in metrics if isinstance(m, EffectiveSampleSize)])
    if isinstance(first, Sum):
        return float(sum(values))
    if isinstance(first, Max):
        return max(values)
    if isinstance(first, Min):
        return min(values)
    return values[-1]


def _join_sample_sizes(metrics: list[EffectiveSampleSize]) -> float:
    count = sum(m.count for m in metrics)
    if count == 0:
        return 0.0
    mean = sum(m.mean * m.count for m in metrics) / count
    mean_square = sum(m.mean * m.mean / m.value * m.count for m in metrics if m.value) / count
    return EffectiveSampleSize.of(mean, mean_square, count).value
