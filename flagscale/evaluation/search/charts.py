"""The charts of a search's page: how candidates fared rung by rung, and what quality costs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from flagscale.evaluation.pages.charts import ROLES, WIDE, Chart, chart
from flagscale.evaluation.search.board import Candidate, SearchBoard

_WIDE = (WIDE, 3.4)
_COLOURS = {"goes on": "after", "dropped": "muted", "failed": "before"}


def rungs(board: SearchBoard) -> Chart:
    """Held-out loss of each candidate at the end of each rung; those that go on stand out."""
    ranked = [one for one in board.candidates if one.points]

    def draw(axes: Axes) -> None:
        for one in reversed(ranked):
            steps = [point.step for point in one.points]
            losses = [point.loss["value"] for point in one.points]
            colour = ROLES[_COLOURS[one.status]]
            axes.plot(steps, losses, "o-", color=colour, markersize=4)
        ends = [(one.points[-1].step, one.points[-1].loss["value"]) for one in ranked]
        _number(axes, ranked, ends, (6, -2))
        axes.set_ylabel(board.measure)
        axes.margins(x=0.08)

    text = "; ".join(
        f"{one.name} " + ", ".join(f"{p.loss['value']:.3g} at step {p.step}" for p in one.points)
        for one in ranked
    )
    return chart("rungs", "What ranks, at the end of each rung", f"{text}.", draw, _WIDE)


def training(board: SearchBoard) -> Chart:
    """Training loss of each candidate, smoothed over five steps."""
    trained = [one for one in board.candidates if one.curve]

    def draw(axes: Axes) -> None:
        for one in reversed(trained):
            steps, losses = zip(*_smooth(one.curve), strict=True)
            axes.plot(steps, losses, color=ROLES[_COLOURS[one.status]], linewidth=1.1)
        axes.set_ylabel("training loss, nats a token")

    text = "; ".join(
        f"{one.name} {one.curve[0][1]:.3g} to {one.curve[-1][1]:.3g}" for one in trained
    )
    return chart("training", "Training loss", f"{text}.", draw, _WIDE)


def front(
    key: str, title: str, label: str, board: SearchBoard, on_front: Collection[int]
) -> Chart | None:
    """Held-out loss of the last rung of each candidate against what it costs.

    Args:
        key: of `Candidate.made`.
        title: the chart's.
        label: of the axis.
        board: the search.
        on_front: numbers of the candidates that no other is better than in both.
    """
    shown = [one for one in board.candidates if one.points and key in one.made]
    if not shown:
        return None

    def draw(axes: Axes) -> None:
        line = sorted((one.made[key], one.points[-1].loss["value"]) for one in shown
                      if one.number in on_front)  # fmt: skip
        axes.plot(*zip(*line, strict=True), "-", color=ROLES["grid"], linewidth=1)
        points = [(one.made[key], one.points[-1].loss["value"]) for one in shown]
        for one, point in zip(shown, points, strict=True):
            role = "after" if one.number in on_front else "muted"
            axes.plot(*point, "o", color=ROLES[role], markersize=5)
        _number(axes, shown, points, (5, 4))
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylabel(f"{board.measure}, last rung of each")
        axes.margins(0.12)

    text = "; ".join(
        f"{one.name} {one.made[key]:.3g}, {one.points[-1].loss['value']:.3g}" for one in shown
    )
    return chart(key.replace("_", "-"), title, f"{text}.", draw)


def _number(
    axes: Axes,
    candidates: Sequence[Candidate],
    points: Sequence[tuple[float, float]],
    offset: tuple[float, float],
) -> None:
    """Write candidates' numbers beside their points; once where several have the same."""
    for point in dict.fromkeys(points):
        here = [one.number for one, own in zip(candidates, points, strict=True) if own == point]
        text = ", ".join(map(str, sorted(here)))
        axes.annotate(text, point, offset, textcoords="offset points", fontsize=7)


def _smooth(curve: Collection[tuple[float, float]]) -> list[tuple[float, float]]:
    points = list(curve)
    return [
        (step, sum(loss for _, loss in points[max(0, i - 4) : i + 1]) / (i + 1 - max(0, i - 4)))
        for i, (step, _) in enumerate(points)
    ]


def pareto(candidates: Collection[Candidate], key: str) -> set[int]:
    """Numbers of the candidates that no other is better than in both loss and cost.

    Only those that were ranked in the same, the last rung that each of them reached, would compare
    without favour: one that was dropped early has its loss of then.
    """
    shown = [one for one in candidates if one.points and key in one.made]

    def beats(a: Candidate, b: Candidate) -> bool:
        mine = (a.points[-1].loss["value"], a.made[key])
        other = (b.points[-1].loss["value"], b.made[key])
        return mine != other and mine[0] <= other[0] and mine[1] <= other[1]

    return {one.number for one in shown if not any(beats(other, one) for other in shown)}
