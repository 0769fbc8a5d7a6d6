"""Perplexities of the same documents under several formats, with standard errors over documents.

A perplexity is exp of a ratio of sums, sum(loss) / sum(tokens). How much one document moves such a number is, to first order, its
influence; the influences of a difference or a ratio of perplexities follow by the chain rule, document by document, so that what
all formats have in common, hard documents and easy ones, cancels. The variance of the number is the sum of squared influences,
times N / (N - 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qurl.ptq.perplexity import DocumentLoss


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A number found on a sample of documents."""

    value: float
    standard_error: float  # over documents; nan for fewer than two
    influences: tuple[float, ...]  # of each document, summing to 0 up to rounding

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} +- {self.standard_error:{spec}}"


def perplexity(losses: Sequence[DocumentLoss]) -> Estimate:
    """exp of nats per token."""
    tokens = sum(document.num_tokens for document in losses)
    mean = sum(document.loss for document in losses) / tokens
    value = math.exp(mean)
    return _estimate(value, [value * (document.loss - mean * document.num_tokens) / tokens for document in losses])


def increase(losses: Sequence[DocumentLoss], baseline: Sequence[DocumentLoss]) -> Estimate:
    """Perplexity over that of the baseline, a difference; both are of the same documents."""
    assert [d.num_tokens for d in losses] == [d.num_tokens for d in baseline]
    ours, theirs = perplexity(losses), perplexity(baseline)
    return _estimate(ours.value - theirs.value, [a - b for a, b in zip(ours.influences, theirs.influences, strict=True)])


def divergence(losses: Sequence[DocumentLoss]) -> Estimate:
    """Nats per token from full precision."""
    tokens = sum(document.num_tokens for document in losses)
    mean = sum(document.divergence for document in losses) / tokens
    return _estimate(mean, [(document.divergence - mean * document.num_tokens) / tokens for document in losses])


def ratio(numerator: Estimate, denominator: Estimate) -> Estimate:
    """Of two `increase`s or two `divergence`s over the same documents."""
    value = numerator.value / denominator.value
    pairs = zip(numerator.influences, denominator.influences, strict=True)
    return _estimate(value, [(a - value * b) / denominator.value for a, b in pairs])


def _estimate(value: float, influences: list[float]) -> Estimate:
    count = len(influences)
    variance = sum(x * x for x in influences) * count / (count - 1) if count > 1 else math.nan
    return Estimate(value=value, standard_error=math.sqrt(variance), influences=tuple(influences))
