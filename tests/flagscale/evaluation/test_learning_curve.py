"""A fitted curve: its arithmetic beside an independent one, and how often its intervals hold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.forecast import Simulated, coverage
from flagscale.evaluation.forecast.importance_sampling import posterior
from flagscale.evaluation.forecast.learning_curve import LearningCurve, Schedule, Series

RATES = [0.25, 0.5, 0.75, *[1.0] * 40, *np.linspace(1, 0, 17)]


def curve(steps: range | list[int]) -> dict[float, float]:
    """One that the formula can be, after so many steps."""
    rates = [0.0, *RATES]
    return {
        float(step): float(
            3 * (0.2 + 0.8 * (1 + sum(rates[: step + 1]) / 2) ** -0.5) * np.exp(0.1 * rates[step])
        )
        for step in steps
    }


def test_a_posterior_that_is_known_exactly() -> None:
    """A normal prior and a normal likelihood, narrow and far out, of two of three parameters."""
    observed, sd = np.array([2.5, -1.0]), np.array([0.05, 0.5])

    def log_likelihood(z_kp: np.ndarray) -> np.ndarray:
        return -0.5 * (((z_kp[:, :2] - observed) / sd) ** 2).sum(axis=1)

    z_kp, weight_k = posterior(log_likelihood, 3, seed=3)
    precision = 1 + np.array([*sd**-2.0, 0.0])
    mean = np.array([*observed * sd**-2.0, 0.0]) / precision
    spread = precision**-0.5
    found = weight_k @ z_kp
    assert weight_k.sum() == pytest.approx(1, rel=1e-12)
    assert np.all(np.abs(found - mean) < 0.06 * spread)
    assert np.sqrt(weight_k @ (z_kp - found) ** 2) == pytest.approx(spread, rel=0.06)


def test_levels_are_integrated_out_exactly() -> None:
    """The likelihood beside that of one multivariate normal distribution of all losses."""
    held_out, other = curve([0, 10, 30]), {4: 2.0, 20: 1.5}
    fitted = LearningCurve([Series(held_out), Series(other, apart=0.2)], RATES)
    z_kp = np.random.default_rng(1).normal(size=(5, 6))
    curves, fit_k, mean_k, variance_k = fitted._levels(z_kp)
    steps = np.array([*held_out, *other], dtype=float)
    logs = np.log([*held_out.values(), *other.values()])
    shape_ki = curves.log_shape(*Schedule(RATES).at(steps))
    apart = np.zeros((5, 5))
    apart[3:, 3:] = 0.2**2
    for k in range(5):
        noise = curves.noise_k[k] ** 2 * np.eye(5)
        covariance = noise + apart + 100.0
        exact = stats.multivariate_normal.logpdf(logs - shape_ki[k], np.zeros(5), covariance)
        constant = -0.5 * 5 * np.log(2 * np.pi)
        assert fit_k[k] + constant == pytest.approx(exact, abs=1e-6)
        gain = 100.0 * np.ones(5) @ np.linalg.inv(covariance)
        assert mean_k[k] == pytest.approx(gain @ (logs - shape_ki[k]), abs=1e-6)
        assert variance_k[k] == pytest.approx(100.0 - gain.sum() * 100.0, abs=1e-6)


def test_a_curve_without_noise_is_found_again_and_more_of_it_is_more_certain() -> None:
    end, whole = len(RATES), curve([len(RATES)])
    widths = []
    for until in (10, 25, 45):
        found = LearningCurve([Series(curve(range(0, until + 1, 5)))], RATES).forecast(end, 0.9)
        assert found.made_at == until
        assert found.low < whole[end] < found.high
        widths.append(found.high / found.low)
    assert widths == sorted(widths, reverse=True)


def test_the_schedule_is_counted_in_steps_at_the_peak() -> None:
    schedule = Schedule([0.5, 1.0, 0.5])
    x_i, h_i = schedule.at(np.array([0.0, 1.0, 2.0, 3.0, 2.5]))
    assert x_i.tolist() == [0.0, 0.5, 1.5, 2.0, 1.75]
    assert h_i.tolist() == [0.0, 0.5, 1.0, 0.5, 0.75]
    assert Schedule([0.5], peak=1.0).at(np.array([1.0]))[0] == [0.5]


def test_the_same_losses_give_the_same_forecast_of_any_training() -> None:
    series = [Series(curve([0, 10, 20]))]
    first, again = (LearningCurve(series, RATES) for _ in range(2))
    assert first.forecast(60, 0.9) == again.forecast(60, 0.9)
    longer = first.forecast(200, 0.9, rates=[1.0] * 200)
    assert longer.value < first.forecast(60, 0.9).value
    assert longer.high / longer.low > first.forecast(60, 0.9).high / first.forecast(60, 0.9).low


def test_losses_that_drift_for_reasons_of_their_own_do_not_carry_the_forecast_away() -> None:
    """A training whose text gets harder, beside validations that do not."""
    drifting = {float(step): 1.0 + 0.1 * step for step in range(1, 31)}
    plain = LearningCurve([Series(curve([0, 10, 20, 30]))], RATES).forecast(60, 0.9)
    both = LearningCurve(
        [Series(curve([0, 10, 20, 30])), Series(drifting, apart=0.3, noisy=True)], RATES
    ).forecast(60, 0.9)
    assert both.value == pytest.approx(plain.value, rel=0.1)


def test_too_few_losses_are_refused_and_those_without_a_logarithm_are_left_out() -> None:
    for losses in ({}, {0: 1.0}, {0: 1.0, 10: 0.0}, {0: 1.0, 10: float("nan")}):
        with pytest.raises(ValueError, match="a curve needs a held-out loss, and a second"):
            LearningCurve([Series(losses)], RATES)


def test_intervals_hold_as_often_as_they_say() -> None:
    """Over curves drawn from the priors; the table of docs/forecast.md is of 2,000."""
    held = coverage(Simulated(), cases=60, seed=11)
    assert 0.8 <= held <= 0.98  # 90%, and 2.6 standard errors
