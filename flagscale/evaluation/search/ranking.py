"""A rung of a search: its candidates from best to worst, and which of them go on.

All candidates were measured on the same held-out samples, which are resampled for all at once: what
makes a sample hard for all cancels, so that the differences are paired (`bootstrap`). A candidate
goes on if it is among the best share that the rung keeps, and is not hopeless: clearly worse than
the best by more than a margin. Merely clearly worse does not do: paired differences are clear after
a few steps of training already, and who is behind then may still overtake.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from flagscale.errors import UserError
from flagscale.evaluation.bootstrap import ratios

_SEED = 0
Losses = Mapping[int, tuple[float, float]]  # number of a sample -> sum over its tokens, tokens


@dataclass(frozen=True)
class Place:
    """A candidate at the end of a rung.

    Attributes:
        number: of the candidate.
        loss: held out, nats a token, with its interval: value, low, high.
        difference: to the best of the rung, paired: value, low, high.
        chance: share of the resamples in which it is better than the best.
        goes_on: to the next rung, or to the end of its training.
        why: it does not go on.
    """

    number: int
    loss: dict[str, float]
    difference: dict[str, float]
    chance: float
    goes_on: bool
    why: str = ""


def places(
    losses: Mapping[int, Losses], slots: int, resamples: int, confidence: float, margin: float
) -> list[Place]:
    """Rank the candidates of a rung.

    Args:
        losses: of each candidate, by its number.
        slots: how many go on at most.
        resamples: of the samples, for the intervals.
        confidence: mass of the intervals; one whose difference to the best is above 0 throughout is
            clearly worse.
        margin: share of the best's loss; one whose difference is above that throughout is hopeless.

    Returns:
        The best first; of equals the one with the smaller number.

    Raises:
        UserError: they were not measured on the same samples, or on fewer than two.
    """
    counts_d = _counts(losses)
    sums = {str(n): np.array([total for total, _ in one.values()]) for n, one in losses.items()}
    found = ratios(sums, counts_d, resamples, _SEED)
    order = sorted(losses, key=lambda number: (_or_last(found[str(number)].value), number))
    best = found[str(order[0])]
    ranked = []
    for position, number in enumerate(order):
        own = found[str(number)]
        difference = own - best
        interval = difference.interval(confidence)
        why = ""
        clear = "clearly" if interval.low > 0 else "not clearly"
        if not math.isfinite(own.value):
            why = "its loss is not finite"
        elif position and interval.low > margin * best.value:
            why = f"clearly worse than the best by more than {margin:.0%}"
        elif position >= slots:
            why = f"beyond the {slots} that go on, {clear} worse than the best"
        ranked.append(
            Place(
                number,
                asdict(own.interval(confidence)),
                asdict(interval),
                float(np.mean(difference.resamples_r < 0)),
                not why,
                why,
            )
        )
    return ranked


def _or_last(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _counts(losses: Mapping[int, Losses]) -> np.ndarray:
    """Tokens of each sample, which all candidates must have been measured on [D]."""
    first, *others = losses
    counts = _tokens(losses[first])
    for other in others:
        if _tokens(losses[other]) != counts:
            raise UserError(
                f"candidates {first} and {other} were not measured on the same samples: make one "
                "of them anew"
            )
    if len(counts) < 2:
        raise UserError(
            f"candidates were measured on {len(counts)} sample(s), and intervals need at least 2: "
            "raise search.samples or data.validation_fraction"
        )
    return np.array([tokens for _, tokens in counts], dtype=np.float64)


def _tokens(losses: Losses) -> Sequence[tuple[int, float]]:
    return [(sample, tokens) for sample, (_, tokens) in losses.items()]
