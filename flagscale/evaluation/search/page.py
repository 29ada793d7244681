"""A search as one HTML page that needs no network and no script, and in short as Markdown."""

from __future__ import annotations

from typing import Any

from flagscale.evaluation.pages.markdown import escaped, table
from flagscale.evaluation.pages.template import template
from flagscale.evaluation.pages.texts import count
from flagscale.evaluation.search import charts as search_charts
from flagscale.evaluation.search import forecasts
from flagscale.evaluation.search.board import Candidate, Point, SearchBoard

_COSTS = {
    "parameters": ("Quality against size", "parameters"),
    "memory_bytes": ("Quality against memory", "bytes in use"),
    "forward_flops_per_token": ("Quality against work", "FLOPs a token"),
}
_ROLES = {"goes on": "distilled", "dropped": "teacher", "failed": "student"}


def render(board: SearchBoard) -> str:
    """The page as HTML. The same search gives the same bytes."""
    fronts = {key: search_charts.pareto(board.candidates, key) for key in _COSTS}
    charts = [search_charts.rungs(board), search_charts.training(board)]
    for key, (title, label) in _COSTS.items():
        found = search_charts.front(key, title, label, board, fronts[key])
        if found is not None:
            charts.append(found)
    return template("search/search.html.j2").render(
        headline=headline(board),
        subtitle=_subtitle(board),
        tiles=_tiles(board),
        rungs=_rungs(board),
        rows=[_row(place, one, board, fronts) for place, one in enumerate(board.candidates, 1)],
        charts=charts,
        forecast=forecasts.section(board),
        board=board,
    )


def summary_markdown(board: SearchBoard) -> str:
    """The outcome so far, and the candidates, those that go on first."""
    columns = ["Candidate", "Outcome", "Size", "Trained", *(f"Rung {n}" for n in _rungs(board))]
    rows = []
    for place, one in enumerate(board.candidates, 1):
        row = _row(place, one, board, {})
        why = f": {one.why}" if one.why else ""
        losses = [_in_short(cell) for cell in row["cells"]]
        rows.append([f"{place}. {one.name}", one.status + why, row["size"], row["cost"], *losses])
    note = (
        f"{board.measure[0].upper()}{board.measure[1:]}, and the difference to the best of the "
        f"rung with its {100 * board.confidence:g}% interval, paired by sample."
    )
    parts = [f"**{escaped(headline(board))}**", escaped(_subtitle(board)), table(columns, rows)]
    return "\n\n".join([*parts, note]) + "\n"


def headline(board: SearchBoard) -> str:
    """The outcome in one sentence, which claims no more than the intervals allow."""
    best = board.candidates[0]
    value, what = best.points[-1].loss["value"], board.measure.partition(",")[0]
    said = f"{best.name}: {what} {value:.3f} after rung {board.rung}"
    close = [
        one
        for one in board.candidates[1:]
        if one.points
        and one.points[-1].rung == board.rung
        and one.points[-1].difference["low"] <= 0
    ]
    if not close:
        return f"{said}, clearly the best of its rung" if _in_rung(board) > 1 else said
    names = close[0].name if len(close) == 1 else f"{len(close)} others"
    return f"{said}, first, but not clearly ahead of {names}"


def _rungs(board: SearchBoard) -> range:
    return range(1, board.rung + 1)


def _in_rung(board: SearchBoard) -> int:
    return sum(any(p.rung == board.rung for p in one.points) for one in board.candidates)


def _subtitle(board: SearchBoard) -> str:
    return (
        f"{len(board.candidates)} students of one teacher, ranked by "
        f"{board.metric.replace('_', ' ')} on {board.samples} held-out samples."
    )


def _tiles(board: SearchBoard) -> list[dict[str, str]]:
    status = [one.status for one in board.candidates]
    tokens = sum(one.tokens for one in board.candidates)
    seconds = sum(one.rank_seconds for one in board.candidates)
    going = status.count("goes on")
    return [
        {"label": "Go on", "value": str(going), "note": f"of {len(status)} candidates"},
        {"label": "Dropped", "value": str(status.count("dropped")), "note": "so far"},
        {
            "label": "Failed",
            "value": str(status.count("failed")),
            "note": "ranked last, with their errors",
        },
        {
            "label": "Trained on",
            "value": f"{count(int(tokens))} tokens",
            "note": f"{_time(seconds)} of ranks, all candidates together",
        },
    ]


def _row(
    place: int, one: Candidate, board: SearchBoard, fronts: dict[str, set[int]]
) -> dict[str, Any]:
    by_rung = {point.rung: point for point in one.points}
    made = one.made
    sizes = [f"{count(int(made['parameters']))} parameters"] if "parameters" in made else []
    if "memory_bytes" in made:
        sizes.append(f"{made['memory_bytes'] / 1e9:.2g} GB in use")
    if one.tokens_per_second:
        sizes.append(f"{one.tokens_per_second:,.0f} tokens/s in training")
    kept = made.get("keep_layers")
    best_in = [_COSTS[key][1] for key, front in fronts.items() if one.number in front]
    return {
        "place": place,
        "number": one.number,
        "name": one.name,
        "role": _ROLES[one.status],
        "status": one.status,
        "why": one.why,
        "size": ", ".join(sizes),
        "layers": f"layers {', '.join(map(str, kept))}" if kept else "",
        "front": f"Pareto front by {', '.join(best_in)}" if best_in else "",
        "cost": f"{_time(one.rank_seconds)}, {count(int(one.tokens))} tokens",
        "cells": [_cell(by_rung.get(rung)) for rung in _rungs(board)],
    }


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 3600:.2g} h"


def _cell(point: Point | None) -> dict[str, str]:
    if point is None:
        return {"value": "", "interval": "", "difference": "", "chance": ""}
    difference = point.difference
    is_best = point.place == 1
    return {
        "value": f"{point.loss['value']:.4f}",
        "interval": f"{point.loss['low']:.4f} to {point.loss['high']:.4f}",
        "difference": "best"
        if is_best
        else f"{difference['value']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})",
        "chance": "" if is_best else f"better in {100 * point.chance:.0f}% of resamples",
    }


def _in_short(cell: dict[str, str]) -> str:
    return f"{cell['value']}, {cell['difference']}" if cell["value"] else ""
