"""What was forecast of a search's candidates from rung to rung, and what came."""

from __future__ import annotations

from flagscale.evaluation.forecast.accounts import CONFIDENCE
from flagscale.evaluation.forecast.learning_curve import Forecast
from flagscale.evaluation.forecast.section import WITHIN, Section, came
from flagscale.evaluation.search.board import Candidate, Point, SearchBoard

_TO_COME = "not measured"


def section(board: SearchBoard) -> Section | None:
    """Of a search's candidates, from rung to rung; None where nothing was forecast."""
    rows = [
        _row(one, point, forecast)
        for one in board.candidates
        for point in one.points
        for forecast in point.forecasts
    ]
    judged = [row for row in rows if row["outcome"] != _TO_COME]
    held = sum(row["outcome"] == WITHIN for row in judged)
    told = f" {held} of {len(judged)} intervals hold what came." if judged else ""
    if not rows:
        return None
    return Section(
        note="The held-out loss on the samples that rank, as a candidate's curve so far would have "
        f"it: the median and its {100 * CONFIDENCE:g}% interval, made of no more than what was "
        f"known after its rung.{told} Of those that were dropped nothing more was measured.",
        heads=("Candidate", "Forecast", "Came", "Outcome"),
        rows=rows,
    )


def _row(one: Candidate, point: Point, forecast: Forecast) -> dict[str, str]:
    later = {after.step: after.loss["value"] for after in one.points}
    value = later.get(forecast.step)
    known = {"came": "", "outcome": _TO_COME, "role": ""}
    return {
        "made": f"{one.number} {one.name}: after step {point.step:,}, of step {forecast.step:,}",
        "value": f"{forecast.value:.4g}",
        "interval": f"{forecast.low:.4g} to {forecast.high:.4g}",
        **(known if value is None else came(forecast.low, forecast.high, value)),
    }
