"""All candidates of a search, best first: what they are and what became of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from flagscale.evaluation.forecast.learning_curve import Forecast
from flagscale.evaluation.search.ranking import Place
from flagscale.recipe.search import LOSSES

Status = Literal["goes on", "dropped", "failed"]
_ORDER: dict[Status, int] = {"goes on": 0, "dropped": 1, "failed": 2}


@dataclass(frozen=True)
class Point:
    """A candidate at the end of a rung.

    Attributes:
        rung: from 1.
        step: optimiser steps of its training.
        place: among the rung's candidates, from 1.
        loss: held out, nats a token; of a task what is missing of its score: value, low, high.
        difference: to the rung's best, paired: value, low, high.
        chance: share of the resamples in which it is better than the best.
        forecasts: of the loss on the same samples, of what was known then: at the end of the next
            rung, and of the training.
    """

    rung: int
    step: int
    place: int
    loss: dict[str, float]
    difference: dict[str, float]
    chance: float
    forecasts: tuple[Forecast, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One of the students that are searched.

    Attributes:
        number: from 1, in the recipe's order.
        name: in the recipe.
        changes: `student.field` -> value, of the fields that are not the same in all.
        status: whether it is trained on.
        why: it is not.
        points: the rungs that it was ranked in.
        curve: [step, loss] of its training.
        made: of its student: parameters, memory_bytes, forward_flops_per_token, keep_layers, shape.
        tokens: that it was trained on so far.
        rank_seconds: of its training so far, all ranks' added up.
        tokens_per_second: median of its training's steps.
        student: pointer to the `student` artifact.
        checkpoints: name of its training.
    """

    number: int
    name: str
    changes: dict[str, Any]
    status: Status = "goes on"
    why: str = ""
    points: tuple[Point, ...] = ()
    curve: tuple[tuple[float, float], ...] = ()
    made: dict[str, Any] = field(default_factory=dict)
    tokens: float = 0.0
    rank_seconds: float = 0.0
    tokens_per_second: float = 0.0
    student: dict[str, Any] | None = None
    checkpoints: str = ""


@dataclass(frozen=True)
class SearchBoard:
    """A search after a rung.

    Attributes:
        rung: from 1.
        metric: which held-out loss or task ranks.
        confidence: mass of the intervals.
        samples: how many were measured on.
        candidates: those that go on, best first; then those that were dropped, the last to go
            first; then those that failed.
    """

    rung: int
    metric: str
    confidence: float
    samples: int
    candidates: tuple[Candidate, ...]

    @property
    def measure(self) -> str:
        """What ranks, for people: the less of it the better."""
        if self.metric in LOSSES:
            return "held-out loss, nats a token"
        return f"1 - {self.metric}"

    @property
    def going_on(self) -> tuple[Candidate, ...]:
        """Best first."""
        return tuple(one for one in self.candidates if one.status == "goes on")

    def as_json(self) -> dict[str, Any]:
        """The content of search.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SearchBoard:
        """The inverse of `as_json`."""
        candidates = tuple(
            Candidate(
                **{
                    **one,
                    "points": tuple(_point(point) for point in one["points"]),
                    "curve": tuple((step, loss) for step, loss in one["curve"]),
                }
            )
            for one in values["candidates"]
        )
        return cls(**{**values, "candidates": candidates})


def _point(values: Mapping[str, Any]) -> Point:
    forecasts = tuple(Forecast(**one) for one in values["forecasts"])
    return Point(**{**values, "forecasts": forecasts})


def after_rung(
    candidates: Sequence[Candidate], ranked: Sequence[Place], rung: int, steps: Mapping[int, int]
) -> tuple[Candidate, ...]:
    """What becomes of the candidates at the end of a rung.

    Args:
        candidates: all of the search; those of the rung as they are now.
        ranked: those of the rung that were measured, best first.
        rung: from 1.
        steps: of each that was measured, optimiser steps.
    """
    found = {one.number: one for one in candidates}
    for position, place in enumerate(ranked, start=1):
        one = found[place.number]
        point = Point(
            rung, steps[place.number], position, place.loss, place.difference, place.chance
        )
        found[place.number] = replace(
            one,
            points=(*one.points, point),
            status="goes on" if place.goes_on else "dropped",
            why=place.why,
        )
    return tuple(sorted(found.values(), key=_key))


def _key(one: Candidate) -> tuple[int, int, int, int]:
    last = one.points[-1] if one.points else None
    return (
        _ORDER[one.status],
        -last.rung if last else 0,
        last.place if last else 0,
        one.number,
    )
