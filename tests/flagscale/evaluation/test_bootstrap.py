"""Intervals against analytic cases, their coverage, pairing and determinism."""

from __future__ import annotations

import numpy as np
import pytest

from flagscale.errors import UserError
from flagscale.evaluation.bootstrap import Interval, ratios


def interval(
    values: np.ndarray, counts: np.ndarray, seed: int = 0, samples: int = 2000
) -> Interval:
    return ratios({"x": values}, counts, samples, seed)["x"].interval(0.95)


def test_value_is_the_ratio_of_sums() -> None:
    found = interval(np.array([1.0, 30.0, 2.0]), np.array([1, 10, 1]))
    assert found.value == pytest.approx(33 / 12)
    assert found.low <= found.value <= found.high


def test_equal_documents_leave_no_doubt() -> None:
    found = interval(np.full(20, 6.0), np.full(20, 3))
    assert (found.low, found.value, found.high) == pytest.approx((2, 2, 2), abs=1e-12)


def test_two_documents_match_the_exact_distribution() -> None:
    estimate = ratios({"x": np.array([0.0, 1.0])}, np.ones(2), 20_000)["x"]
    values, counts = np.unique(estimate.resamples_r, return_counts=True)
    assert values.tolist() == [0.0, 0.5, 1.0]
    assert counts / 20_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(5, 2, 2000)
    found = interval(values, np.ones(2000), samples=4000)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_95_percent_intervals_hold_93_to_97_percent_of_cases() -> None:
    """Also of few documents, where plain percentiles are too narrow; see benchmarks/coverage.py."""
    generator = np.random.default_rng(7)
    hits = 0
    for trial in range(2000):
        counts = generator.integers(60, 129, 24)
        hardness = generator.gamma(8, 0.25, 24)  # mean 2 nats a token
        found = interval(hardness * counts, counts, seed=trial, samples=400)
        hits += found.low <= 2 <= found.high
    assert 0.93 <= hits / 2000 <= 0.97


def test_wider_confidence_gives_a_wider_interval() -> None:
    values = np.random.default_rng(1).normal(5, 2, 50)
    estimate = ratios({"x": values}, np.ones(50), 1000)["x"]
    narrow, wide = estimate.interval(0.8), estimate.interval(0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_same_seed_same_interval() -> None:
    values, counts = np.arange(9.0), np.arange(1, 10)
    assert interval(values, counts, seed=3) == interval(values, counts, seed=3)
    assert interval(values, counts, seed=3) != interval(values, counts, seed=4)


def test_differences_are_paired() -> None:
    generator = np.random.default_rng(2)
    hard = generator.gamma(2, 3, 40)
    estimates = ratios({"before": hard + 0.1, "after": hard}, np.ones(40), 1000)
    alone = estimates["after"].interval(0.95)
    difference = (estimates["after"] - estimates["before"]).interval(0.95)
    assert difference.value == pytest.approx(-0.1)
    assert difference.high - difference.low < 1e-9 < alone.high - alone.low


def test_perplexity_is_the_exponential() -> None:
    estimate = ratios({"x": np.random.default_rng(3).gamma(2, 1, 30)}, np.ones(30), 1000)["x"]
    loss, perplexity = estimate.interval(0.95), estimate.exp().interval(0.95)
    assert perplexity.value == pytest.approx(np.exp(loss.value))
    assert perplexity.low == pytest.approx(np.exp(loss.low), rel=1e-2)


def test_reduction() -> None:
    estimates = ratios({"a": np.array([2.0, 4.0]), "b": np.array([10.0, 20.0])}, np.ones(2), 100)
    found = estimates["a"].reduction_from(estimates["b"]).interval(0.95)
    assert (found.low, found.value, found.high) == pytest.approx((0.8, 0.8, 0.8))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, counts = np.arange(9.0), np.arange(1, 10)
    whole = interval(values, counts)
    monkeypatch.setattr("flagscale.evaluation.bootstrap._BLOCK_ELEMENTS", 100)
    assert interval(values, counts) == whole


def test_one_document_is_refused() -> None:
    with pytest.raises(UserError, match=r"1 document\(s\).*data.test_fraction"):
        ratios({"x": np.ones(1)}, np.ones(1), 100)
