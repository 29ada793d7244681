"""What convert-student made, as one HTML page that needs no network, no script and no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flagscale.evaluation.measure.layer_importance import LayerImportance
from flagscale.evaluation.pages.template import template
from flagscale.evaluation.pages.texts import count, flat

_CRITERIA = {
    "kl": "Layers went one by one: each time the one without which the teacher stays closest to "
    "itself, by KL(teacher || cut).",
    "block_influence": "Layers went in the order of their block influence (ShortGPT): one minus "
    "the cosine between what goes into a layer and what comes out.",
}
_LABELS = {"kl": "KL without it, nats a token", "block_influence": "block influence"}


def render(
    facts: Mapping[str, Any],
    importance: LayerImportance | None,
    widths: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """The page as HTML. The same values give the same bytes.

    Args:
        facts: of the student's manifest.
        importance: of the teacher's layers, where it was measured.
        widths: by the recipe's name of a size that was cut, what share of all importance its most
            important one, two, ..., all have.
    """
    layers, parameters = facts["shape"]["num_layers"], count(int(facts["parameters"]))
    return template("pages/student.html.j2").render(
        headline=f"A student of {layers} layers, {parameters} parameters",
        subtitle=_subtitle(facts, importance),
        criterion=importance and _CRITERIA[importance.criterion],
        charts=_charts(importance),
        removals=_rows(importance),
        widths=_widths(facts, widths or {}),
        facts=flat(facts),
    )


def _subtitle(facts: Mapping[str, Any], importance: LayerImportance | None) -> str:
    loss = f"KL to its teacher before training: {facts['kd_loss_at_start']:.3g} nats a token"
    if importance is None or not importance.removals:
        return f"{loss}, on one validation sample."
    last = importance.removals[-1]
    return (
        f"{len(importance.removals)} of the teacher's {len(importance.scores)} layers removed; "
        f"before training KL {last.kl:.3g} nats a token, top-1 agreement "
        f"{100 * last.top1_agreement:.1f}% on {importance.tokens:,} tokens of calibration text."
    )


def _charts(importance: LayerImportance | None) -> list[Any]:
    if importance is None or not importance.removals:
        return []
    from flagscale.evaluation.pages import (
        student_charts as charts,  # Matplotlib: half a second that most students save
    )

    removals, layers = importance.removals, len(importance.scores)
    gone = [removal.layer for removal in removals]
    return [
        charts.removals(
            gone,
            [removal.kl for removal in removals],
            [layers - number for number in range(1, len(removals) + 1)],
        ),
        charts.scores(importance.scores, gone, _LABELS[importance.criterion]),
    ]


def _widths(facts: Mapping[str, Any], shares: Mapping[str, Sequence[float]]) -> list[Any]:
    if not shares:
        return []
    from flagscale.evaluation.pages import student_charts as charts

    return [charts.widths(shares, facts["width_importance"]["sizes"])]


def _rows(importance: LayerImportance | None) -> list[dict[str, str]]:
    if importance is None:
        return []
    return [
        {
            "left": str(len(importance.scores) - number),
            "layer": str(removal.layer),
            "kl": f"{removal.kl:.3f}",
            "agreement": f"{100 * removal.top1_agreement:.1f}%",
        }
        for number, removal in enumerate(importance.removals, start=1)
    ]
