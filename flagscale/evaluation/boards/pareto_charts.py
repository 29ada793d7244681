"""Quality against size, speed and cost, with the front of each board."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from flagscale.evaluation.boards.run_board import AXES, QUALITY, SCALES, Board
from flagscale.evaluation.figures import SHOWN
from flagscale.evaluation.pages.charts import ROLES, Chart, chart

_SPREAD = 3.0  # largest beside smallest from which on an axis is logarithmic
_MOST_NAMED = 12  # points with a number beside them


def pareto_charts(board: Board, number: int) -> list[Chart]:
    """A chart for each axis that the students do not have in common.

    Args:
        board: any.
        number: of the board on its page.
    """
    rows = board.leaderboard.rows
    axes = [
        axis
        for axis in board.axes
        if axis != QUALITY and len({board.places[row.number].values[axis] for row in rows}) > 1
    ]
    return [_against(board, axis, f"pareto-{number}-{axis}") for axis in axes]


def _against(board: Board, axis: str, page_id: str) -> Chart:
    metric = SHOWN[board.leaderboard.metric]
    rows = board.leaderboard.rows
    scale = 100 if metric.percent else 1
    x = np.array([board.places[row.number].values[axis] for row in rows]) / SCALES.get(axis, 1)
    intervals = [row.figures[board.leaderboard.metric] for row in rows]
    y, low, high = (
        np.array([one[key] * scale for one in intervals]) for key in ("value", "low", "high")
    )
    on_front = [board.places[row.number].dominated_by is None for row in rows]

    def draw(axes: Axes) -> None:
        for i, row in enumerate(rows):
            colour = ROLES["after" if on_front[i] else "muted"]
            axes.plot([x[i], x[i]], [low[i], high[i]], color=colour, linewidth=1.2, alpha=0.6)
            axes.plot(x[i], y[i], "o", color=colour, markersize=6)
            if len(rows) <= _MOST_NAMED:
                axes.annotate(
                    str(row.rank), (x[i], y[i]), xytext=(6, 4), textcoords="offset points"
                )
        if x.min() > 0 and x.max() / x.min() > _SPREAD:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.set_xlabel(AXES[axis].label)
        axes.set_ylabel(metric.label + (", %" if metric.percent else ", nats a token"))
        axes.margins(x=0.12, y=0.12)

    text = "; ".join(
        f"{row.name} {metric.label} {metric.text(y[i] / scale)} at {x[i]:.4g}"
        + (", on the front" if on_front[i] else "")
        for i, row in enumerate(rows)
    )
    label = AXES[axis].label
    title = f"{metric.label} against {label[0].lower()}{label[1:]}"
    return chart(page_id, title, f"{text}.", draw)
