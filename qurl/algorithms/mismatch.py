"""How far the quantized policy that sampled is from the full-precision policy of the same weight version."""

from __future__ import annotations

from torch import Tensor

from qurl.algorithms.masked import clamped_log_ratio, token_means
from qurl.observability.metrics import EffectiveSampleSize, Max, Metric


def mismatch_metrics(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, truncation: float) -> dict[str, Metric]:
    """The mismatch/ metrics over rho = pi_old / pi_rollout of the trained tokens; the log ratio is clamped to +-20.

    Logprobs [B, L] in nats, mask [B, L] bool, truncation: C > 0. Tokens are samples of pi_rollout, so the k3 estimate
    rho - 1 - log rho has the mean KL(rollout || old) and no negative value (Schulman, "Approximating KL divergence"). The
    effective sample size is that of the truncated weights min(rho, C), (sum w)^2 / (n sum w^2): 1 where the policies agree.
    Everything joins exactly over micro-batches and ranks."""
    log_rho = clamped_log_ratio(old_logprobs.detach(), rollout_logprobs.detach(), mask)
    rho = log_rho.exp()
    weights = rho.clamp(max=truncation)
    means = token_means(mask, {
        "mismatch/kl_rollout_old": log_rho.expm1() - log_rho,
        "mismatch/ratio_mean": rho,
        "mismatch/abs_logprob_diff": log_rho.abs(),
        "mismatch/truncated_fraction": rho > truncation,
        "weight": weights,
        "squared_weight": weights.square(),
    })
    weight, squared_weight = means.pop("weight"), means.pop("squared_weight")
    ratio_max = rho.masked_fill(~mask, 0.0).max().item() if mask.any() else 0.0
    return {
        **means,
        "mismatch/ratio_max": Max(ratio_max),
        "mismatch/ess_fraction": EffectiveSampleSize.of(weight.value, squared_weight.value, weight.weight),
    }
