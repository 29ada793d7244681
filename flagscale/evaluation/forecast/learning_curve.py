"""How a loss will fall on, from how it fell so far: a fitted curve with its uncertainty.

    loss(t) = level * g(x(t)) * exp(wander * h(t))
    g(x) = floor + (1 - floor) * (1 + x / scale)^-power

`x(t)` are the learning rates of the steps so far, added up, in steps at the peak: how far training
has come, whatever its warmup and decay (Tissue et al., arXiv 2408.11029, whose law has a power of
the same sum). `h(t)` is the rate of the last step as a share of the peak: the higher it is, the
further weights wander from where they are best, so that losses fall when it decays, and a student
that begins close to its teacher gets worse first. `floor` is the share that stays for ever.

What is not known has broad priors, and is drawn from its posterior (`importance_sampling`);
`level`, and what sets one kind of loss apart from another, are integrated out exactly, as
logarithms are Gaussian there. The same losses give the same forecast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flagscale.evaluation.forecast.importance_sampling import DRAWS, posterior

_SEED = 0
_BINS = 16  # of a series of single, noisy losses: neighbours in time are taken together
_LEVEL = 10.0  # prior of the logarithm of the first loss: any
DRIFT = 0.1  # a forecast's own error, for each doubling of `x` beyond what was seen
DRIFT_FREEDOM = 4  # degrees of its Student distribution: some trainings are no such curve
_FEWEST = 4  # of noisy losses, to know how noisy


@dataclass(frozen=True)
class Series:
    """Losses of one kind.

    Attributes:
        losses: after a number of optimiser steps -> nats a token.
        apart: standard deviation of the logarithm of what sets this kind apart, as other text; 0
            for the kind that is forecast.
        noisy: each loss is of other text, and of the weights before the step, as a training's.
    """

    losses: Mapping[float, float]
    apart: float = 0.0
    noisy: bool = False

    @property
    def usable(self) -> dict[float, float]:
        """Those that have a logarithm, in the order of their steps."""
        return {
            step: loss
            for step, loss in sorted(self.losses.items())
            if loss > 0 and math.isfinite(loss)
        }


@dataclass(frozen=True)
class Forecast:
    """A loss that was not measured when it was made.

    Attributes:
        made_at: steps of the training that it is made from.
        step: that it is for.
        value: the median, nats a token.
        low: of the interval.
        high: of the interval.
    """

    made_at: int
    step: int
    value: float
    low: float
    high: float


class LearningCurve:
    """A curve that is fitted to a training's losses."""

    def __init__(self, series: Sequence[Series], rates: Sequence[float]) -> None:
        """Fit it.

        Args:
            series: the forecast kind first.
            rates: learning rate of each optimiser step of the training, up to its end.

        Raises:
            ValueError: there are too few losses to fit a curve to.
        """
        self._schedule = Schedule(rates)
        kinds = [_observed(one) for one in series]
        if not len(kinds[0].step_i) or sum(len(kind.step_i) for kind in kinds) < 2:
            raise ValueError("a curve needs a held-out loss, and a second loss at another step")
        self.made_at = int(max(max(one.usable) for one in series if one.usable))
        self._kinds = kinds
        self._z_kp, self._weight_k = posterior(
            lambda z_kp: self._levels(z_kp)[1], Curves.PARAMETERS, _SEED
        )

    def forecast(self, step: float, confidence: float, rates: Sequence[float] = ()) -> Forecast:
        """The loss after so many steps.

        Args:
            step: optimiser steps since the beginning.
            confidence: mass of the interval.
            rates: of another training, longer or shorter than the one that was fitted; default: of
                that one.
        """
        log_loss = self.log_losses(step, rates)
        tail = (1 - confidence) / 2
        low, value, high = np.exp(np.quantile(log_loss, (tail, 0.5, 1 - tail)))
        return Forecast(self.made_at, int(step), float(value), float(low), float(high))

    def log_losses(self, step: float, rates: Sequence[float] = ()) -> np.ndarray:
        """Logarithms of what the loss may be after so many steps, each as probable; see above."""
        schedule = Schedule(rates, self._schedule.peak) if len(rates) else self._schedule
        x_i, h_i = schedule.at(np.array([step], dtype=np.float64))
        seen_i, _ = self._schedule.at(np.array([self.made_at], dtype=np.float64))
        doublings = max(0.0, math.log2((x_i[0] + 1) / (seen_i[0] + 1)))
        generator = np.random.default_rng(_SEED)
        chosen = generator.choice(len(self._weight_k), DRAWS, p=self._weight_k)
        curves, _, level_k, variance_k = self._levels(self._z_kp[chosen])
        centre = level_k + curves.log_shape(x_i, h_i)[:, 0]
        noise = np.sqrt(variance_k + curves.noise_k**2) * generator.standard_normal(DRAWS)
        drift: np.ndarray = DRIFT * doublings * generator.standard_t(DRIFT_FREEDOM, DRAWS)
        return centre + noise + drift

    def _levels(self, z_kp: np.ndarray) -> tuple[Curves, np.ndarray, np.ndarray, np.ndarray]:
        """Curves, how well they fit [K], and mean and variance of their levels' logarithms [K]."""
        curves = Curves(z_kp, self._schedule.length)
        return curves, *_level(curves, self._kinds, self._schedule)


class Schedule:
    """Learning rates as a training's progress: `x` and `h` of the module's formula."""

    def __init__(self, rates: Sequence[float], peak: float | None = None) -> None:
        """Add them up.

        Args:
            rates: of each optimiser step.
            peak: of the training that a curve was fitted to; default: the highest of them.
        """
        found = np.asarray(rates, dtype=np.float64)
        self.peak = float(found.max()) if peak is None else peak
        self._share = np.concatenate([[0.0], found / self.peak])
        self._progress = np.cumsum(self._share)

    @property
    def length(self) -> float:
        """Of the whole training, in steps at the peak."""
        return float(self._progress[-1])

    def at(self, step_i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`x` and `h` after so many steps [I]; a mean over several may lie between two."""
        steps = np.arange(len(self._share))
        return np.interp(step_i, steps, self._progress), np.interp(step_i, steps, self._share)


class Curves:
    """Parameters of curves [K], whose priors are standard normal distributions of `z`."""

    PARAMETERS = 6

    def __init__(self, z_kp: np.ndarray, length: float) -> None:
        floor, power, scale, wander, noise, misfit = z_kp.T
        self.floor_k = 1 / (1 + np.exp(0.7 - 1.6 * floor))  # half of them below a third
        self.power_k = 0.5 * np.exp(0.7 * power)
        self.scale_k = math.sqrt(length + 1) * np.exp(0.7 * math.log(length + 2) * scale / 2)
        self.wander_k = 0.25 * np.exp(1.1 * wander)
        self.noise_k = 0.012 * np.exp(0.7 * noise)
        self.misfit_k = 0.06 * np.exp(misfit)  # of noisy losses: their text may change with time

    def log_shape(self, x_i: np.ndarray, h_i: np.ndarray) -> np.ndarray:
        """Logarithm of the curve without its level [K, I]."""
        fallen = np.exp(-self.power_k[:, None] * np.log1p(x_i / self.scale_k[:, None]))
        floor = self.floor_k[:, None]
        return np.log(floor + (1 - floor) * fallen) + self.wander_k[:, None] * h_i


@dataclass(frozen=True)
class _Observed:
    """Logarithms of the losses of one kind.

    Attributes:
        step_i: of each; of several taken together, their mean.
        log_loss_i: nats a token.
        noise_i: standard deviation that they have beside what is drawn.
        apart: see `Series`.
        noisy: see there.
    """

    step_i: np.ndarray
    log_loss_i: np.ndarray
    noise_i: np.ndarray
    apart: float
    noisy: bool = False


def _observed(one: Series) -> _Observed:
    found = one.usable
    step_i = np.array([*found], dtype=np.float64)
    log_loss_i = np.log(np.array([*found.values()], dtype=np.float64))
    if not one.noisy:
        return _Observed(step_i, log_loss_i, np.zeros(len(found)), one.apart)
    if len(found) < _FEWEST:
        return _Observed(step_i[:0], log_loss_i[:0], step_i[:0], one.apart)
    single = math.sqrt(float(np.mean(np.diff(log_loss_i) ** 2)) / 2)
    edges = np.unique(np.geomspace(1, len(found) + 1, _BINS + 1).round().astype(int) - 1)
    count = np.diff(edges)
    step_i, log_loss_i = (
        np.add.reduceat(values, edges[:-1]) / count for values in (step_i - 1, log_loss_i)
    )
    return _Observed(step_i, log_loss_i, single / np.sqrt(count), one.apart, noisy=True)


def _level(
    curves: Curves, kinds: Sequence[_Observed], schedule: Schedule
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How well curves fit, and the level that they then have.

    What is left of the logarithms beside a curve is the level, what sets a kind apart, and noise,
    all Gaussian.

    Returns:
        Logarithm of the likelihood, and mean and variance of the level's logarithm [K].
    """
    count = len(curves.noise_k)
    likelihood, mean, total = np.zeros(count), np.zeros(count), np.full(count, _LEVEL**-2)
    for kind in kinds:
        if not len(kind.step_i):
            continue
        rest_ki = kind.log_loss_i - curves.log_shape(*schedule.at(kind.step_i))
        own_k = curves.misfit_k if kind.noisy else curves.noise_k
        precision_ki = 1 / (kind.noise_i**2 + own_k[:, None] ** 2)
        precision = precision_ki.sum(axis=1)
        centre = (precision_ki * rest_ki).sum(axis=1) / precision
        around = (precision_ki * (rest_ki - centre[:, None]) ** 2).sum(axis=1)
        variance = 1 / precision + kind.apart**2  # of the centre, about the level
        whole = variance + 1 / total  # with what is known of the level so far
        likelihood += 0.5 * (np.log(precision_ki).sum(axis=1) - np.log(precision) - around)
        likelihood -= 0.5 * (np.log(whole) + (centre - mean) ** 2 / whole)
        joint = total + 1 / variance
        mean, total = (total * mean + centre / variance) / joint, joint
    return likelihood, mean, 1 / total
