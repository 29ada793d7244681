"""What a training's logs say of how it will end; and afterwards, whether it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flagscale.evaluation.forecast.learning_curve import Forecast, LearningCurve, Series

CONFIDENCE = 0.9  # of a forecast's interval: one in ten is to miss
KD_LOSS, LM_LOSS = "logits distillation loss", "lm loss"
SAMPLES_APART = 0.1  # of losses on more or fewer samples of the validation split
TRAINING_APART = 0.3  # of losses in training: other text
_RATE = "learning rate"
_CUTS = (0.25, 0.5, 0.75)  # of a training, after which it is held to account

Log = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Account:
    """A forecast beside what came.

    Attributes:
        forecast: as it was made, of what was known then.
        came: the loss that was measured later.
    """

    forecast: Forecast
    came: float

    @property
    def holds(self) -> bool:
        """Whether the interval holds what came."""
        return self.forecast.low <= self.came <= self.forecast.high

    def as_json(self) -> dict[str, Any]:
        """For metrics.json and its like."""
        return {**asdict(self.forecast), "came": self.came, "holds": self.holds}


def decisive_loss(training: Log) -> str:
    """The loss that a training is about: its distillation loss, or without one the text's."""
    return KD_LOSS if any(row.get(KD_LOSS) for row in training) else LM_LOSS


def losses_of(log: Log, key: str, until: float = float("inf")) -> dict[float, float]:
    """Of one kind, by the optimiser steps after which they were measured."""
    return {row["step"]: row[key] for row in log if key in row and row["step"] <= until}


def curve_of(
    training: Log,
    validation: Log,
    rates: Sequence[float],
    key: str,
    until: float = float("inf"),
    samples: Mapping[float, float] | None = None,
    *,
    of_samples: bool = False,
) -> LearningCurve:
    """Fit the validation loss of a training, or that on a search's samples.

    Args:
        training: rows of training.jsonl.
        validation: rows of validation.jsonl.
        rates: of each optimiser step of the training, to its end.
        key: which loss.
        until: steps after which nothing is known.
        samples: held-out losses of a search's rungs, by their steps.
        of_samples: forecast those.

    Raises:
        ValueError: there is too little to fit.
    """
    held_out = [losses_of(validation, key, until), samples or {}]
    if of_samples:
        held_out.reverse()
    forecast, other = held_out
    series = [
        Series(forecast),
        Series(other, apart=SAMPLES_APART),
        Series(losses_of(training, key, until), apart=TRAINING_APART, noisy=True),
    ]
    return LearningCurve(series, rates)


def accounts(training: Log, validation: Log) -> list[Account]:
    """What was to be forecast of a finished training's last validation at parts of it.

    Each forecast is of what the logs held at its time alone.

    Args:
        training: rows of training.jsonl.
        validation: rows of validation.jsonl.
    """
    if not training or not validation or not all(_RATE in row for row in training):
        return []
    key, end = decisive_loss(training), int(validation[-1]["step"])
    came = validation[-1][key]
    rates = [row[_RATE] for row in training]
    found: list[Account] = []
    for cut in dict.fromkeys(int(share * end) for share in _CUTS):
        try:
            curve = curve_of(training, validation, rates, key, until=cut)
        except ValueError:
            continue
        found.append(Account(curve.forecast(end, CONFIDENCE), came))
    return found
