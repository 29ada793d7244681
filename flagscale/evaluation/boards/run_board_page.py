"""Boards of runs as one HTML page that needs no network, and as Markdown for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flagscale.evaluation.boards.leaderboard import Row
from flagscale.evaluation.boards.leaderboard_page import headline, page_parts
from flagscale.evaluation.boards.pareto_charts import pareto_charts
from flagscale.evaluation.boards.run_board import AXES, MISSING, QUALITY, SCALES, Board
from flagscale.evaluation.fidelity import FIGURES
from flagscale.evaluation.figures import SHOWN, verdict
from flagscale.evaluation.pages.charts import Chart
from flagscale.evaluation.pages.template import template
from flagscale.evaluation.pages.texts import count
from flagscale.evaluation.tasks.columns import TaskColumn


def render(boards: Sequence[Board], title: str, notes: Sequence[str] = ()) -> str:
    """The page as HTML. The same boards give the same bytes.

    Args:
        boards: at least one.
        title: what was compared, e.g. the experiment's name.
        notes: what was left out, a sentence each.
    """
    return template("boards/run_board.html.j2").render(
        title=title,
        headline=headline(boards[0].leaderboard, "student"),
        subtitle=_subtitle(boards),
        notes=notes,
        sections=[_section(number, board) for number, board in enumerate(boards, start=1)],
    )


def markdown(boards: Sequence[Board], notes: Sequence[str] = ()) -> str:
    """The same as tables.

    Args:
        boards: at least one.
        notes: what was left out, a sentence each.
    """
    return "\n".join([*(_board_markdown(board) for board in boards), *notes])


def _subtitle(boards: Sequence[Board]) -> str:
    students = sum(len(board.students) for board in boards)
    if len(boards) == 1:
        return f"{students} students, measured on {_measured(boards[0])}."
    return (
        f"{students} students on {len(boards)} boards: figures of different documents, windows or "
        "teachers cannot be compared. The largest board comes first."
    )


def _measured(board: Board) -> str:
    one = board.leaderboard
    return (
        f"the same {one.documents:,} held-out documents, {one.tokens:,} tokens, with the same "
        f"teacher; {100 * one.confidence:g}% intervals"
    )


def _section(number: int, board: Board) -> dict[str, Any]:
    rows = board.leaderboard.rows
    return {
        **page_parts(board.leaderboard, "student", f"ranking-{number}"),
        "number": number,
        "measured": _measured(board),
        "axes": [_axis_label(board, axis) for axis in board.axes],
        "left_out": [what for what, names in MISSING.items() if not names & {*board.axes}],
        "places": [_place(board, row) for row in rows],
        "pareto": [_figure(chart) for chart in pareto_charts(board, number)],
        "tasks": [_task_heading(column) for column in board.tasks],
        "on_tasks": [_on_tasks(board, row) for row in rows],
        "teacher_on_tasks": [_score(column.teacher) for column in board.tasks],
        "beside": [_beside(row) for row in rows[1:]],
        "figures": [SHOWN[figure].label for figure in FIGURES],
        "runs": [
            {"rank": row.rank, "name": row.name, "run_id": board.student(row).run_id}
            for row in rows
        ],
        "varied": [
            {"field": field, "values": [row.changes[field] for row in rows]}
            for field in board.varied
        ],
    }


def _figure(chart: Chart) -> dict[str, Any]:
    return {"title": chart.title, "svg": chart.svg}


def _axis_label(board: Board, axis: str) -> str:
    return SHOWN[board.leaderboard.metric].label if axis == QUALITY else AXES[axis].label


def _place(board: Board, row: Row) -> dict[str, Any]:
    place = board.places[row.number]
    return {
        "name": row.name,
        "on_front": place.dominated_by is None,
        "values": [_value(board, axis, place.values) for axis in board.axes],
        "verdict": _standing(board, row),
    }


def _standing(board: Board, row: Row) -> str:
    """Whether something else is preferable in everything, and how surely."""
    place = board.places[row.number]
    if place.dominated_by is None:
        return "on the front"
    by = board.students[place.dominated_by - 1].name
    return f"{by} is preferable" + ("" if place.is_clear else ", its quality not clearly")


def _value(board: Board, axis: str, values: Mapping[str, float]) -> str:
    value = values[axis]
    if axis == QUALITY:
        return SHOWN[board.leaderboard.metric].text(value)
    if axis == "parameters":
        return count(int(value))
    value /= SCALES.get(axis, 1)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _task_heading(column: TaskColumn) -> str:
    return f"{column.name}, {column.examples:,} examples"


def _score(score: tuple[float, float | None] | None) -> str:
    if score is None:
        return ""
    value, error = score
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def _on_tasks(board: Board, row: Row) -> dict[str, Any]:
    cells = []
    for column in board.tasks:
        cell = column.cells.get(row.number)
        if cell is None:
            cells.append({"value": "not asked", "interval": "", "verdict": ""})
            continue
        interval = ""
        if cell.difference is not None:
            value, low, high = (f"{cell.difference[key]:+.3g}" for key in ("value", "low", "high"))
            interval = f"{value} ({low} to {high}) {cell.verdict}"
        cells.append(
            {
                "value": _score((cell.value, cell.error)),
                "interval": interval,
                "verdict": cell.verdict,
            }
        )
    return {"name": row.name, "cells": cells}


def _beside(row: Row) -> dict[str, Any]:
    cells = []
    for figure in FIGURES:
        difference = row.difference[figure]
        value, low, high = (
            SHOWN[figure].text(difference[key], signed=True) for key in ("value", "low", "high")
        )
        cells.append(
            {
                "label": SHOWN[figure].label,
                "value": value,
                "interval": f"{low} to {high}".replace(" points", ""),
                "verdict": verdict(figure, difference),
            }
        )
    return {"name": row.name, "cells": cells}


def _board_markdown(board: Board) -> str:
    one, keys = board.leaderboard, _keys(board)
    head = ["", "student", *(SHOWN[key].label for key in keys), "beside the best"]
    rows = [
        [
            str(row.rank),
            row.name,
            *(_interval(key, row.figures[key]) for key in keys),
            _difference(one.metric, row),
        ]
        for row in one.rows
    ]
    rows += [
        ["", name, *(_interval(key, figures[key]) for key in keys), ""]
        for name, figures in one.references.items()
    ]
    front = [[row.name, *_place(board, row)["values"], _standing(board, row)] for row in one.rows]
    parts = [
        f"{headline(one, 'student')}.",
        _table(head, rows),
        _table(["", *(_axis_label(board, axis) for axis in board.axes), "Pareto front"], front),
    ]
    if board.tasks:
        scores = [
            [
                one["name"],
                *(f"{cell['value']}  {cell['interval']}".strip() for cell in one["cells"]),
            ]
            for one in (_on_tasks(board, row) for row in one.rows)
        ]
        scores.append(["Teacher", *(_score(column.teacher) for column in board.tasks)])
        parts.append(_table(["tasks", *map(_task_heading, board.tasks)], scores))
    if board.varied:
        changes = [[f, *(str(row.changes[f]) for row in one.rows)] for f in board.varied]
        parts.append(_table(["differs", *(row.name for row in one.rows)], changes))
    parts.append(f"Measured on {_measured(board)}, paired by document.\n")
    return "\n".join(parts)


def _keys(board: Board) -> list[str]:
    metric = board.leaderboard.metric
    return [metric, *(key for key in FIGURES if key != metric)]


def _interval(figure: str, interval: Mapping[str, float]) -> str:
    value, low, high = (SHOWN[figure].text(interval[key]) for key in ("value", "low", "high"))
    return value if low == high else f"{value} [{low}, {high}]"


def _difference(metric: str, row: Row) -> str:
    if row.verdict == "best":
        return "best"
    value, low, high = (
        SHOWN[metric].text(row.difference[metric][key], signed=True)
        for key in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}], {row.verdict}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown whose columns are aligned for a terminal as well."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * max(3, width) for width in widths], *rows]
    return "".join(
        f"| {' | '.join(c.ljust(max(3, w)) for c, w in zip(line, widths, strict=True))} |\n"
        for line in lines
    )
