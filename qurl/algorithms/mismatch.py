"""How far the quantized policy that sampled is from the full-precision policy of the same weight version, and why."""

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


def mismatch_parts(
    old_logprobs: Tensor,
    quantized_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    is_stale: Tensor,
    is_quantized: bool = True,
    perturbed_logprobs: Tensor | None = None,
) -> dict[str, Metric]:
    """The gap between pi_rollout and pi_old in parts, by way of pi_q: the learner's forward at the weights of pi_old, but with the
    codes that were published and the format's rule for activations in every quantized layer.

    Logprobs [B, L] in nats, of the sampled tokens. mask [B, L] bool, trained tokens. is_stale [B, L] bool: of a sample that older
    weights than those of pi_old had a part in. Per token

        log pi_rollout - log pi_old = (log pi_q - log pi_old) + (log pi_rollout - log pi_q)

    The first term is quantization. The second is, in a fresh sample, what else the engine does otherwise: kernels, order of sums,
    dtype of what is not quantized. In a stale sample it also holds what the updates since then changed. Means of these terms, the
    `_log_ratio`s, are k1 estimates (tokens are samples of pi_rollout), may be negative, and add up:

        mean(log pi_rollout - log pi_old) = quantization + (fresh tokens / all) engine + (stale tokens / all) staleness

    The `_kl`s are k3 estimates as mismatch/kl_rollout_old is: less variance, none negative. engine_kl and staleness_kl have the
    mean KL(rollout || q). quantization_kl has that of rho - 1 - log rho, rho = pi_old / pi_q, over pi_rollout instead of pi_q,
    which to second order is KL(q || old). They do not add up: that would take terms that do not correlate.

    Amplified rounding is most of engine_kl. Two correct forwards differ in their last bits, so activations get other codes in layer
    after layer, until the two errors of quantization are nearly independent draws. On a language model of 135 M parameters in INT8
    engine_kl was 0.030 to 0.042 beside a quantization_kl of 0.031 to 0.050, with engine and learner in float32. On models of 3 M
    it stays near 0. So engine_kl is read beside engine_kl_floor: the distance between pi_q and pi_q with embeddings moved by one
    rounding of the coarser dtype. About equal: the engine computes what it should. Several times larger: its arithmetic differs.
    The floor is a lower estimate, since an engine rounds anew in each layer.

    perturbed_logprobs: of that moved forward, in the arithmetic of the engines; None: no floor. The estimate is k3 as the others,
    over the tokens of engine_kl.

    is_quantized: False where the engines sampled with another arithmetic than that of pi_q: full precision, or more blocks of
    Ax-BxP. Quantization is then what it would be; engine and staleness are told from pi_old, and what that arithmetic loses is
    among them.

    A part without tokens is left out. Log ratios are clamped to +-20; everything joins exactly over micro-batches and ranks."""
    old, quantized, rollout = (logprobs.detach() for logprobs in (old_logprobs, quantized_logprobs, rollout_logprobs))
    log_rho = clamped_log_ratio(old, quantized, mask)
    metrics: dict[str, Metric] = {"mismatch/quantization_ratio_max": Max(log_rho.exp().masked_fill(~mask, 0.0).max().item())}
    held = quantized if is_quantized else old
    terms = {"quantization": (old, quantized, mask), "engine": (held, rollout, mask & ~is_stale),
             "staleness": (held, rollout, mask & is_stale)}  # fmt: skip
    if perturbed_logprobs is not None and (fresh := mask & ~is_stale).any():
        log_ratio = clamped_log_ratio(held, perturbed_logprobs.detach(), fresh)
        metrics |= token_means(fresh, {"mismatch/engine_kl_floor": log_ratio.expm1() - log_ratio})
    for name, (target, source, tokens) in terms.items():
        if tokens.any():
            log_ratio = clamped_log_ratio(target, source, tokens)
            metrics |= token_means(tokens, {
                f"mismatch/{name}_kl": log_ratio.expm1() - log_ratio, f"mismatch/{name}_log_ratio": -log_ratio,
            })  # fmt: skip
    return metrics
