"""The report: one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flagscale.artifacts import Manifest
from flagscale.evaluation.fidelity import TEACHER
from flagscale.evaluation.figures import AFTER, BEFORE, DETAILS, LABELS, SHOWN, verdict
from flagscale.evaluation.forecast import section as forecast_section
from flagscale.evaluation.pages import charts
from flagscale.evaluation.pages.audit import headline as audit_headline
from flagscale.evaluation.pages.template import template
from flagscale.evaluation.pages.texts import count, flat
from flagscale.evaluation.report import sections
from flagscale.evaluation.report.data import ReportData
from flagscale.evaluation.report.verdict import kept, percent
from flagscale.evaluation.report.verdict import verdict as whole_verdict
from flagscale.evaluation.tasks.scores import TaskScores


def render(data: ReportData, tasks: Sequence[TaskScores] = ()) -> str:
    """The report as HTML. The same data give the same bytes.

    Args:
        data: of the evaluation.
        tasks: what the models scored on tasks.
    """
    tokens_d = np.maximum(data.fidelity.tokens_d, 1)
    kl = {m: data.fidelity.sums[m]["kl"] / tokens_d for m in (BEFORE, AFTER)}
    drawn = (
        charts.losses(data.training, data.validation),
        charts.documents(kl[BEFORE], kl[AFTER]),
        charts.curve(data.training, "grad norm", "Gradient norm", "muted"),
        charts.curve(data.training, "learning rate", "Learning rate", "muted"),
    )
    return template("report/report.html.j2").render(
        headline=whole_verdict(data, tasks),
        method=data.method,
        lead=f"{headline(data.metrics)}. {_subtitle(data)}",
        tiles=_tiles(data),
        columns=[(figure.label, figure.meaning) for figure in SHOWN.values()],
        models=_model_rows(data),
        paired=_paired_rows(data.metrics),
        details=sections.details(data),
        tasks=sections.tasks_shown(data, tasks),
        left_out=kept(data, tasks).left_out,
        token_charts=sections.token_pictures(data.findings),
        findings=data.findings,
        beside=sections.beside(data),
        costs=[*sections.costs(data), *sections.generation(data)],
        percent=percent,
        charts=[chart for chart in drawn if chart is not None],
        generations=[{k: _shown(v) for k, v in g.items()} for g in data.generations],
        labels=LABELS,
        forecast=forecast_section.section(data.training, data.validation),
        metrics=data.metrics,
        recipe=_recipe(data),
        facts=_facts(data.manifests),
        provenance=_provenance(data),
    )


def headline(metrics: Mapping[str, Any]) -> str:
    """The outcome in one sentence, which claims no more than the intervals allow."""
    difference, reduction = metrics["paired"]["kl"], metrics["kl_reduction"]
    said = verdict("kl", difference)
    if reduction is None or said in ("not clear", "equal"):
        value = SHOWN["kl"].text(metrics["models"][AFTER]["kl"]["value"])
        than = {
            "better": "less than",
            "worse": "more than",
            "equal": "the same as",
            "not clear": "not clearly different from",
        }
        return f"KL to the teacher is {value}, {than[said]} before"
    if reduction < 0:
        return f"KL to the teacher rises by {-100 * reduction:.0f}%"
    return f"KL to the teacher falls by {_percent(reduction)}"


def _shown(text: str) -> str:
    """A continuation without the page of blank lines that a poor model may write."""
    return re.sub(r"\n\s*\n\s*\n", "\n\n", text).rstrip()


def _percent(share: float) -> str:
    """Whole percents, but never a 100% that is not one."""
    return f"{100 * share:.0f}%" if share < 0.99 else f"{100 * share:.2f}%"


def _subtitle(data: ReportData) -> str:
    layers, metrics = data.layers, data.metrics
    origin = data.manifests["teacher"].facts.get("origin", {})
    teacher = origin.get("base_model") or data.manifests["teacher"].recipe["teacher"]["source"]
    whose = (
        f"taught a student of {layers[AFTER]}"
        if data.method == "distillation"
        else f"beside a student of {layers[AFTER]} that was trained on the text alone"
    )
    return (
        f"{teacher}, {layers[TEACHER]} layers, {whose}. Measured on "
        f"{metrics['documents']:,} held-out documents, {metrics['tokens']:,} tokens."
    )


def _tiles(data: ReportData) -> list[dict[str, str]]:
    models = data.metrics["models"]
    tiles = []
    for key in ("kl", "top1_agreement", "lm_loss"):
        figure = SHOWN[key]
        reference = f"teacher {figure.text(models[TEACHER][key]['value'])}"
        tiles.append(
            {
                "label": figure.label,
                "before": figure.text(models[BEFORE][key]["value"]),
                "after": figure.text(models[AFTER][key]["value"]),
                "note": reference
                if key == "lm_loss"
                else ("nats a token", "of tokens")[figure.percent],
            }
        )
    share = data.parameters[AFTER] / data.parameters[TEACHER]
    tiles.append(
        {
            "label": "Parameters",
            "before": count(data.parameters[TEACHER]),
            "after": count(data.parameters[AFTER]),
            "note": f"{100 * share:.0f}% of the teacher's",
        }
    )
    return tiles


def _model_rows(data: ReportData) -> list[dict[str, Any]]:
    rows = []
    for model, figures in data.metrics["models"].items():
        cells = []
        for key, shown in SHOWN.items():
            itself = model == TEACHER and key in ("kl", "top1_agreement")
            value, low, high = (shown.text(figures[key][x]) for x in ("value", "low", "high"))
            interval = "by definition" if itself else f"{low} to {high}"
            cells.append({"label": shown.label, "value": value, "interval": interval})
        size = f"{data.layers[model]} layers, {count(data.parameters[model])}"
        rows.append({"key": model, "name": LABELS[model], "size": size, "cells": cells})
    return rows


def _paired_rows(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for key, shown in {**SHOWN, **DETAILS}.items():
        if key not in metrics["paired"]:
            continue
        difference = metrics["paired"][key]
        value, low, high = (
            shown.text(difference[x], signed=True) for x in ("value", "low", "high")
        )
        rows.append(
            {
                "label": shown.label,
                "value": value,
                "interval": f"{low} to {high}".replace(" points", ""),
                "verdict": verdict(key, difference),
            }
        )
    return rows


def _recipe(data: ReportData) -> dict[str, list[tuple[str, str]]]:
    """Section -> its fields, in the order of the steps that were given them."""
    sections: dict[str, Any] = {}
    for manifest in data.manifests.values():
        sections |= manifest.recipe
    sections["evaluation"] = data.evaluation
    return {name: flat(values) for name, values in sections.items()}


def _facts(manifests: Mapping[str, Manifest]) -> dict[str, list[tuple[str, str]]]:
    return {
        name: flat({key: _told(key, value) for key, value in manifest.facts.items()})
        for name, manifest in manifests.items()
        if manifest.facts
    }


def _told(key: str, value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """An audit, which has a page of its own, in a line."""
    return audit_headline(value) if key == "audit" else value


def _provenance(data: ReportData) -> list[tuple[str, str]]:
    rows = [(f"{name} artifact", manifest.digest) for name, manifest in data.manifests.items()]
    hashes = {m.tokenizer_hash for m in data.manifests.values() if m.tokenizer_hash}
    rows += [("tokenizer", value) for value in sorted(hashes)]
    return rows + list(data.manifests["distilled"].libraries.items())
