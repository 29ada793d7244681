# mypy: disallow-untyped-defs=False
# ruff: noqa: ANN001, ANN201, ANN202, N803 - Triton infers types, and spells a kernel's constants so
"""Each divergence's formula once more, per column, because Triton compiles no torch."""

from __future__ import annotations

import triton
import triton.language as tl

_FORWARD_KL, _REVERSE_KL, _JENSEN_SHANNON, _SKEW_KL, _TOTAL_VARIATION = range(5)
FORWARD_KL = tl.constexpr(_FORWARD_KL)
REVERSE_KL = tl.constexpr(_REVERSE_KL)
JENSEN_SHANNON = tl.constexpr(_JENSEN_SHANNON)
SKEW_KL = tl.constexpr(_SKEW_KL)
TOTAL_VARIATION = tl.constexpr(_TOTAL_VARIATION)
LARGEST = tl.constexpr(3.4028234663852886e38)
SMALLEST = tl.constexpr(-3.4028234663852886e38)
NEAR = tl.constexpr(0.1)

KINDS = {
    "ForwardKL": _FORWARD_KL,
    "ReverseKL": _REVERSE_KL,
    "JensenShannon": _JENSEN_SHANNON,
    "SkewKL": _SKEW_KL,
    "TotalVariation": _TOTAL_VARIATION,
}


@triton.jit
def loss_of(p, q, x, weight, KIND: tl.constexpr):
    """What a column adds to the divergence."""
    if KIND == FORWARD_KL:
        loss = _kl(p, x, q - p)
    elif KIND == REVERSE_KL:
        loss = _kl(q, -x, p - q)
    elif KIND == JENSEN_SHANNON:
        to_p, to_q = _logs_of_mixture(x, weight)
        loss = weight * (p * to_p) + (1 - weight) * (q * to_q)
    elif KIND == SKEW_KL:
        to_p, _ = _logs_of_mixture(x, weight)
        loss = _kl(p, to_p, (1 - weight) * (q - p))
    else:
        loss = tl.where(x > 0, p - q, q - p) / 2
    return loss


@triton.jit
def excess_and_room(p, q, x, weight, KIND: tl.constexpr):
    """As `bounded.Bounded`; of the KLs there is none."""
    excess, room = p * 0, p * 0
    if KIND == JENSEN_SHANNON:
        _, to_q = _logs_of_mixture(x, weight)
        odds = weight / (1 - weight) * tl.exp(tl.minimum(x, 0.0))
        limit = -_log1p(-weight, 1 - weight)
        room = _log1p(odds, 1 + odds) - tl.minimum(to_q, 0.0)
        excess, room = q * to_q, q * room * ((1 - weight) / limit)
    elif KIND == SKEW_KL:
        _, to_q = _logs_of_mixture(x, weight)
        share = (1 - weight) * tl.exp(to_q)
        excess, room = (q - p) * share, p * share
    elif KIND == TOTAL_VARIATION:
        excess = tl.where(x > 0, 0.0, tl.where(x < 0, q, q / 2))
        room = q - excess
    return excess, room


@triton.jit
def gradient_of(p, q, x, weight, loss, all_excess, all_room, KIND: tl.constexpr):
    """By the student's scaled logit, given the sums of whole rows."""
    if KIND == REVERSE_KL:
        gradient = q * (tl.maximum(-x, SMALLEST) - loss)
    elif KIND == TOTAL_VARIATION:
        # What is below, written so that a fused product cannot leave a rounding of equal models.
        equal = (all_room - all_excess) / 2
        gradient = q * tl.where(x < 0, all_room, tl.where(x > 0, -all_excess, equal))
    else:
        excess, room = excess_and_room(p, q, x, weight, KIND)
        gradient = excess * all_room - room * all_excess
    return gradient


@triton.jit
def _kl(p, x, difference):
    """`p x + difference`, x = log(p / q), difference = q - p; a series where both are close."""
    x = tl.maximum(x, SMALLEST)
    series = p * x * x * (1 / 2 - x * (1 / 6 - x * (1 / 24 - x / 120)))
    return tl.where(tl.abs(x) < NEAR, series, p * x + difference)


@triton.jit
def _logs_of_mixture(x, weight):
    """log(p / m) and log(q / m), as in `mixtures`."""
    x = tl.minimum(tl.maximum(x, SMALLEST), LARGEST)
    share = tl.where(x > 0, 1 - weight, weight)
    other = tl.where(x > 0, weight, 1 - weight)
    over_larger = share * tl.exp(-tl.abs(x)) + other  # m: 1 + y, of which few digits are left
    log_m = _log1p(share * _expm1(-tl.abs(x)), over_larger)
    to_q = tl.where(weight == 0, 0.0, -log_m - tl.maximum(x, 0.0))
    return tl.where(weight == 0, x, tl.minimum(x, 0.0) - log_m), to_q


@triton.jit
def _expm1(x):
    """`exp(x) - 1` for x <= 0."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.25, series, tl.exp(x) - 1)


@triton.jit
def _log1p(y, whole):
    """`log(1 + y)` for y > -1, and `whole`, which is 1 + y, where that is far from 1."""
    r = y / (2 + y)
    square = r * r
    series = 2 * r * (1 + square * (1 / 3 + square * (1 / 5 + square / 7)))
    return tl.where(tl.abs(y) < 0.25, series, tl.log(whole))
