"""The part of a report that holds forecasts to account; in the page by `forecast.html.j2`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from flagscale.evaluation.forecast.accounts import (
    CONFIDENCE,
    KD_LOSS,
    Account,
    Log,
    accounts,
    decisive_loss,
)
from flagscale.evaluation.pages.charts import ROLES, WIDE, Chart, chart

_NAMES = {KD_LOSS: "distillation loss"}
_WIDE = (WIDE, 3.0)
WITHIN = "within"


@dataclass(frozen=True)
class Section:
    """What the template shows.

    Attributes:
        note: what it is, in a sentence or two.
        heads: of the table's columns.
        rows: `made`, `value`, `interval`, `came`, `outcome` and its `role` in the page's colours.
        chart: of the same.
    """

    note: str
    heads: Sequence[str]
    rows: Sequence[Mapping[str, str]]
    chart: Chart | None = None


def section(training: Log, validation: Log) -> Section | None:
    """Of one training; None where there was too little to forecast from.

    Args:
        training: rows of training.jsonl.
        validation: rows of validation.jsonl.
    """
    found = accounts(training, validation)
    if not found:
        return None
    key = decisive_loss(training)
    name, end = _NAMES.get(key, "LM loss"), found[0].forecast.step
    held = sum(account.holds for account in found)
    return Section(
        note=f"The validation's {name} after step {end} as the curve so far would have it, fitted "
        f"to no more than the logs held at the time: the median, its {100 * CONFIDENCE:g}% "
        f"interval, and the loss that was measured. {held} of {len(found)} intervals hold it.",
        heads=("Made after step", f"Forecast for step {end}", "Came", "Outcome"),
        rows=[_row(account) for account in found],
        chart=_chart(found, validation, key),
    )


def _row(account: Account) -> dict[str, str]:
    forecast = account.forecast
    return {
        "made": f"{forecast.made_at:,}",
        "value": f"{forecast.value:.4g}",
        "interval": f"{forecast.low:.4g} to {forecast.high:.4g}",
        **came(forecast.low, forecast.high, account.came),
    }


def came(low: float, high: float, value: float) -> dict[str, str]:
    """The cells of what came, and how it lies to the interval."""
    outcome = WITHIN if low <= value <= high else ("below" if value < low else "above")
    role = {WITHIN: "", "below": "better", "above": "worse"}[outcome]
    return {"came": f"{value:.4g}", "outcome": outcome, "role": role}


def _chart(found: Sequence[Account], validation: Log, key: str) -> Chart:
    measured = {row["step"]: row[key] for row in validation if key in row}
    end = found[0].forecast.step

    def draw(axes: Axes) -> None:
        axes.plot(
            [*measured], [*measured.values()], "o", color=ROLES["after"], markersize=5,
            label="measured",
        )  # fmt: skip
        for number, account in enumerate(found):
            one, colour = account.forecast, ROLES["other"]
            label = "forecast of the end, when made" if number == 0 else None
            axes.plot([one.made_at] * 2, [one.low, one.high], color=colour, linewidth=2)
            axes.plot(one.made_at, one.value, "D", color=colour, markersize=5, label=label)
        axes.axhline(found[0].came, color=ROLES["muted"], linewidth=1, linestyle="--")
        axes.set_ylabel("nats a token")
        axes.set_ylim(bottom=0)

    text = "; ".join(_described(account) for account in found)
    title = f"Validation loss, and what was forecast of it for step {end}"
    return chart("forecast", title, f"{text}. {found[0].came:.3g} came.", draw, _WIDE)


def _described(account: Account) -> str:
    one = account.forecast
    return f"after step {one.made_at}: {one.value:.3g} ({one.low:.3g} to {one.high:.3g})"


def told(training: Log, validation: Log) -> list[dict[str, Any]]:
    """The accounts as metrics.json has them."""
    return [account.as_json() for account in accounts(training, validation)]
