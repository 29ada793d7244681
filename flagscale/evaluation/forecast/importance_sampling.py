"""Draws of what is not known, weighted by how well they fit: adaptive importance sampling.

In rounds, each of which draws where the round before found weight (Cappe et al., "Adaptive
importance sampling in general mixture classes", 2008). The first rounds temper the weights, so that
a likelihood with a narrow peak is found from a broad prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

DRAWS = 4096  # a round
_TEMPERS = (0.05, 0.15, 0.4, 1.0, 1.0)  # of the weights after each round but the last
_PRIOR_SHARE = 0.1  # of each round's draws, so that nothing is lost for ever
_WIDER = 1.3  # than what the round before found
_FREEDOM = 5  # degrees, of the Student distribution that later rounds draw from


def posterior(
    log_likelihood: Callable[[np.ndarray], np.ndarray], parameters: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw from a posterior whose prior is the standard normal distribution.

    Args:
        log_likelihood: of points [K, P] -> [K]; finite.
        parameters: how many, P.
        seed: the same gives the same draws.

    Returns:
        Points [K, P] and their weights [K], which add up to 1.
    """
    generator = np.random.default_rng(seed)
    centre, factor = np.zeros(parameters), np.eye(parameters)
    rounds: list[tuple[np.ndarray, np.ndarray]] = []
    for number, temper in enumerate((*_TEMPERS, 1.0)):
        z_kp = generator.standard_normal((DRAWS, parameters))
        if number:
            adapted = generator.random(DRAWS) >= _PRIOR_SHARE
            tails = np.sqrt(_FREEDOM / generator.chisquare(_FREEDOM, DRAWS))[:, None]
            z_kp[adapted] = centre + ((z_kp * tails) @ factor.T)[adapted]
        prior = _log_normal(z_kp)
        proposed = prior
        if number:
            own = _log_student(z_kp, centre, factor)
            proposed = np.logaddexp(
                prior + math.log(_PRIOR_SHARE), own + math.log(1 - _PRIOR_SHARE)
            )
        log_weight = log_likelihood(z_kp) + prior - proposed
        rounds.append((z_kp, log_weight))
        weight = _normalised(temper * log_weight)
        centre = weight @ z_kp
        around = z_kp - centre
        spread = (around * weight[:, None]).T @ around + 1e-4 * np.eye(parameters)
        factor = np.linalg.cholesky(_WIDER**2 * spread)
    # The last two drew where the weight is; each draw counts by its density alone.
    z_kp, log_weight = (np.concatenate(parts) for parts in zip(*rounds[-2:], strict=True))
    return z_kp, _normalised(log_weight)


def _log_normal(z_kp: np.ndarray) -> np.ndarray:
    """Log density of the standard normal distribution [K]."""
    density: np.ndarray = -0.5 * (z_kp**2).sum(axis=1)
    return density - 0.5 * z_kp.shape[1] * math.log(2 * math.pi)


def _log_student(z_kp: np.ndarray, centre: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Log density of a multivariate Student distribution of `_FREEDOM` degrees [K]."""
    count, freedom = z_kp.shape[1], _FREEDOM
    square_k = (np.linalg.solve(factor, (z_kp - centre).T) ** 2).sum(axis=0)
    constant = (
        math.lgamma((freedom + count) / 2)
        - math.lgamma(freedom / 2)
        - 0.5 * count * math.log(freedom * math.pi)
        - float(np.log(np.diag(factor)).sum())
    )
    density: np.ndarray = constant - 0.5 * (freedom + count) * np.log1p(square_k / freedom)
    return density


def _normalised(log_weight: np.ndarray) -> np.ndarray:
    weight: np.ndarray = np.exp(log_weight - log_weight.max())
    return weight / weight.sum()
