"""A leaderboard as one HTML page that needs no network and no script, and in short as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flagscale.evaluation.boards.leaderboard import Leaderboard, Row
from flagscale.evaluation.fidelity import FIGURES
from flagscale.evaluation.figures import SHOWN
from flagscale.evaluation.pages import charts
from flagscale.evaluation.pages.markdown import escaped, table
from flagscale.evaluation.pages.template import template
from flagscale.evaluation.pages.texts import count

_ROLES = {"best": "after", "equal": "after", "not clear": "muted", "worse": "before"}


def render(board: Leaderboard) -> str:
    """The page as HTML. The same leaderboard gives the same bytes."""
    return template("boards/leaderboard.html.j2").render(
        headline=headline(board),
        subtitle=_subtitle(board),
        tiles=_tiles(board),
        **page_parts(board),
    )


def page_parts(
    board: Leaderboard, what: str = "variant", page_id: str = "ranking"
) -> dict[str, Any]:
    """What leaderboard_table.html.j2 shows, and the chart beside it.

    Args:
        board: any.
        what: a row is, in the singular.
        page_id: of the chart, unique on its page.
    """
    metric = SHOWN[board.metric]
    return {
        "what": what,
        "board": board,
        "metric": metric,
        "columns": [(SHOWN[key].label, SHOWN[key].meaning) for key in _keys(board)],
        "rows": [_cells(row, board) for row in board.rows],
        "references": [
            {"name": name, "cells": _figures(figures, board)}
            for name, figures in board.references.items()
        ],
        "chart": charts.ranking(
            [row.name for row in board.rows],
            [row.figures[board.metric] for row in board.rows],
            [_ROLES.get(row.verdict, "muted") for row in board.rows],
            metric.label + (", % of tokens" if metric.percent else ", nats a token"),
            metric.percent,
            page_id,
        ),
    }


def summary_markdown(board: Leaderboard) -> str:
    """The outcome, the variants best first, and those that failed."""
    deciding, *others = (SHOWN[key].label for key in _keys(board))
    columns = ["Variant", deciding, "Minus the best", *others]
    rows = []
    for row in board.rows:
        shown = _cells(row, board)
        first, *others = (_in_short(cell) for cell in shown["cells"])
        beside = f"{shown['difference']} ({shown['interval']}), {row.verdict}"
        size = f"{row.rank}. {row.name} ({count(row.parameters)} parameters)"
        rows.append([size, first, "" if row.verdict == "best" else beside, *others])
    for name, figures in board.references.items():
        first, *others = (_in_short(cell) for cell in _figures(figures, board))
        rows.append([name, first, "", *others])
    parts = [f"**{escaped(headline(board))}**", escaped(_subtitle(board)), table(columns, rows)]
    parts += [f"* {escaped(one.name)} failed: {escaped(one.error)}" for one in board.failed]
    note = f"{100 * board.confidence:g}% intervals over documents; the difference is paired."
    return "\n\n".join([*parts, note]) + "\n"


def headline(board: Leaderboard, what: str = "variant") -> str:
    """The outcome in one sentence, which claims no more than the intervals allow."""
    metric, best = SHOWN[board.metric], board.winner
    close = _not_worse(board)
    value = metric.text(best.figures[board.metric]["value"])
    said = f"{best.name}: {metric.label} {value}"
    if not close:
        return f"{said}, the best of {len(board.rows)} {what}s"
    if len(close) == 1:
        return f"{said}, first, but not clearly ahead of {close[0].name}"
    return f"{said}, first, but not clearly ahead of {len(close)} others"


def _not_worse(board: Leaderboard) -> list[Row]:
    """Other variants that the figures do not tell from the winner."""
    return [row for row in board.rows[1:] if row.verdict != "worse"]


def _subtitle(board: Leaderboard) -> str:
    failed = f" {len(board.failed)} failed." if board.failed else ""
    return (
        f"{len(board.rows)} variants of one recipe, which share teacher and data. Measured on "
        f"{board.documents:,} held-out documents, {board.tokens:,} tokens.{failed}"
    )


def _tiles(board: Leaderboard) -> list[dict[str, str]]:
    metric, best, last = SHOWN[board.metric], board.winner, board.rows[-1]
    interval = best.figures[board.metric]
    sizes = [row.parameters for row in board.rows]
    return [
        {
            "label": f"Best {metric.label}",
            "value": metric.text(interval["value"]),
            "note": f"{metric.text(interval['low'])} to {metric.text(interval['high'])}",
        },
        {
            "label": f"Last {metric.label}",
            "value": metric.text(last.figures[board.metric]["value"]),
            "note": last.name,
        },
        {
            "label": "Not clearly worse",
            "value": f"{len(_not_worse(board))} of {len(board.rows) - 1}",
            "note": "other variants, paired by document",
        },
        {
            "label": "Parameters of the best",
            "value": count(best.parameters),
            "note": "all variants alike"
            if min(sizes) == max(sizes)
            else f"of {count(min(sizes))} to {count(max(sizes))}",
        },
    ]


def _cells(row: Row, board: Leaderboard) -> dict[str, Any]:
    metric = SHOWN[board.metric]
    difference = row.difference[board.metric]
    value, low, high = (metric.text(difference[x], signed=True) for x in ("value", "low", "high"))
    best = row.verdict == "best"
    return {
        "rank": row.rank,
        "number": row.number,
        "name": row.name,
        "role": {"best": "distilled", "worse": "student"}.get(row.verdict, "teacher"),
        "size": ", ".join(_size(row)),
        "cells": _figures(row.figures, board),
        "difference": "" if best else value,
        "interval": "" if best else f"{low} to {high}".replace(" points", ""),
        "verdict": row.verdict,
    }


def _size(row: Row) -> list[str]:
    size = [f"{count(row.parameters)} parameters"]
    return size + ([f"{row.tokens_per_second:,.0f} tokens/s"] if row.tokens_per_second else [])


def _keys(board: Leaderboard) -> list[str]:
    """The deciding figure, then the others; the perplexity says what the LM loss says."""
    return [board.metric, *(key for key in FIGURES if key != board.metric)]


def _figures(
    figures: Mapping[str, Mapping[str, float]], board: Leaderboard
) -> list[dict[str, str]]:
    cells = []
    for key in _keys(board):
        shown = SHOWN[key]
        value, low, high = (shown.text(figures[key][x]) for x in ("value", "low", "high"))
        interval = "" if low == high else f"{low} to {high}"
        cells.append({"label": shown.label, "value": value, "interval": interval})
    return cells


def _in_short(cell: Mapping[str, str]) -> str:
    return f"{cell['value']} ({cell['interval']})" if cell["interval"] else cell["value"]
