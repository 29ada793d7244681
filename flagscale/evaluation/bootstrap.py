"""Confidence intervals: a percentile bootstrap over documents (Efron, 1979).

Tokens of one document are alike, so the documents are drawn, with replacement, and each figure is
a ratio of sums over the drawn ones. All figures of an evaluation share the same draws, so
differences between models are paired: what makes a document hard for both cancels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flagscale.errors import UserError

_BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Interval:
    """A figure with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A figure on the documents themselves and on each resample of them; arithmetic is paired."""

    value: float
    resamples_r: np.ndarray

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference, on the same draws."""
        return Estimate(self.value - other.value, self.resamples_r - other.resamples_r)

    def reduction_from(self, before: Estimate) -> Estimate:
        """`1 - self / before`, on the same draws."""
        return Estimate(1 - self.value / before.value, 1 - self.resamples_r / before.resamples_r)

    def exp(self) -> Estimate:
        """The exponential: a perplexity from a loss in nats a token."""
        return Estimate(float(np.exp(self.value)), np.exp(self.resamples_r))

    def interval(self, confidence: float) -> Interval:
        """The percentile interval that holds `confidence` of the resamples."""
        tail = (1 - confidence) / 2
        low, high = np.quantile(self.resamples_r, (tail, 1 - tail))
        return Interval(float(self.value), float(low), float(high))


def ratios(
    sums: Mapping[str, np.ndarray], counts_d: np.ndarray, samples: int, seed: int = 0
) -> dict[str, Estimate]:
    """Estimate `sum(sums[name]) / sum(counts)` for each name, all on the same draws.

    Args:
        sums: name -> one number a document [D].
        counts_d: what they are divided by: tokens of each document [D].
        samples: resamples.
        seed: of the draws; the same seed and number of documents draw the same documents.

    Raises:
        UserError: fewer than two documents, which say nothing about other documents.
    """
    documents = len(counts_d)
    if documents < 2:
        raise UserError(
            f"the test split has {documents} document(s) to measure on, intervals need at least "
            "2: raise data.test_fraction or evaluation.max_documents, or give more documents"
        )
    columns_dc = np.stack([*sums.values(), counts_d], axis=1).astype(np.float64)
    generator = np.random.default_rng(seed)
    equal = np.full(documents, 1 / documents)
    block = max(1, _BLOCK_ELEMENTS // documents)
    blocks = [
        generator.multinomial(documents, equal, size=min(block, samples - start)) @ columns_dc
        for start in range(0, samples, block)
    ]
    drawn_rc = np.concatenate(blocks)
    drawn_rc = drawn_rc[:, :-1] / drawn_rc[:, -1:]
    values_c = columns_dc[:, :-1].sum(axis=0) / columns_dc[:, -1].sum()
    return {name: Estimate(float(values_c[c]), drawn_rc[:, c]) for c, name in enumerate(sums)}
