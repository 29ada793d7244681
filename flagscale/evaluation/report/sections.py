"""The report's parts about single tokens, tasks, other runs and costs, as rows that it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from flagscale.evaluation import bootstrap
from flagscale.evaluation.fidelity import TEACHER
from flagscale.evaluation.figures import AFTER, BEFORE, DETAILS, LABELS, SHOWN, verdict
from flagscale.evaluation.pages.charts import Chart
from flagscale.evaluation.report import token_charts
from flagscale.evaluation.report.costs import Costs
from flagscale.evaluation.report.data import ReportData
from flagscale.evaluation.report.token_findings import TokenFindings
from flagscale.evaluation.report.verdict import others_figures, percent, seeds_spread
from flagscale.evaluation.tasks.scores import TaskScores
from flagscale.evaluation.tasks.table import decimals, task_rows

_MODELS = (TEACHER, BEFORE, AFTER)
# A model, what the student less it is called, and where a task's row has that.
_COMPARED = {
    TEACHER: ("After - teacher", "difference"),
    BEFORE: ("After - before", "against_before"),
}


def details(data: ReportData) -> dict[str, Any] | None:
    """Divergences and calibration of each model; None where they were not measured."""
    models, calibration = data.metrics["models"], data.metrics.get("calibration", {})
    shown = {key: figure for key, figure in DETAILS.items() if key in models[AFTER]}
    if not shown:
        return None
    rows = []
    for model in _MODELS:
        cells = [_cell(figure.label, figure, models[model][key]) for key, figure in shown.items()]
        if model in calibration:
            ece, over = calibration[model]["ece"], calibration[model]["overconfidence"]
            low, high = (f"{100 * over[x]:+.1f}" for x in ("low", "high"))
            cells += [
                {"label": "ECE", "value": f"{100 * ece:.1f}%", "interval": ""},
                {
                    "label": "Overconfidence",
                    "value": f"{100 * over['value']:+.1f} points",
                    "interval": f"{low} to {high}",
                },
            ]
        rows.append({"key": model, "cells": cells})
    meanings = [(figure.label, figure.meaning) for figure in shown.values()]
    if calibration:
        meanings += [
            (
                "ECE",
                "Expected calibration error: how far, on average, the probability of the most "
                "probable token is from how often it is the text's. Without an interval: it is "
                "never below 0, so noise raises it.",
            ),
            ("Overconfidence", "That probability, less the token accuracy; below 0: too unsure."),
        ]
    return {"rows": rows, "meanings": meanings}


def _cell(label: str, figure: Any, interval: dict[str, float]) -> dict[str, str]:  # noqa: ANN401
    value, low, high = (figure.text(interval[x]) for x in ("value", "low", "high"))
    return {"label": label, "value": value, "interval": "" if low == high else f"{low} to {high}"}


def token_pictures(findings: TokenFindings | None) -> list[Chart]:
    """Where the student is far from its teacher, and how sure models are."""
    if findings is None:
        return []
    drawn = [token_charts.slices(name, found) for name, found in findings.slices.items()]
    return [*drawn, token_charts.reliability(findings.calibration)]


def tasks_shown(data: ReportData, tasks: Sequence[TaskScores]) -> dict[str, Any] | None:
    """A row a metric, with the paired differences to those that were asked; None without tasks."""
    rows = task_rows(tasks, data.metrics["bootstrap_samples"], data.metrics["confidence"])
    if not rows:
        return None
    models = [model for model in LABELS if any(model in row.reported for row in rows)]
    compared = [_COMPARED[model] for model in models if model in _COMPARED]
    shown = []
    for row in rows:
        cells = [{"value": row.text(m) or "not asked", "interval": "", "class": ""} for m in models]
        cells += [_difference(getattr(row, name), row.higher_is_better) for _, name in compared]
        direction = "higher" if row.higher_is_better else "lower"
        about = f"{row.metric}, {row.examples:,} examples, {direction} is better"
        shown.append({"name": row.name, "metric": about, "cells": cells})
    columns = [*(LABELS[model] for model in models), *(label for label, _ in compared)]
    return {"columns": columns, "rows": shown}


def _difference(interval: bootstrap.Interval | None, higher_is_better: bool) -> dict[str, str]:
    if interval is None:
        return {"value": "no value for each example", "interval": "", "class": ""}
    clear = interval.low > 0 or interval.high < 0
    better = (interval.value > 0) == higher_is_better
    digits = decimals((interval.high - interval.low) / 4)  # about a standard error
    value, low, high = (f"{x:+.{digits}f}" for x in (interval.value, interval.low, interval.high))
    return {
        "value": value,
        "interval": "" if low == high else f"{low} to {high}",
        "class": ("better" if better else "worse") if clear else "",
    }


def beside(data: ReportData) -> dict[str, Any] | None:
    """The student beside other runs, the closest to the teacher first; None without any."""
    if not data.others:
        return None
    rows = []
    for one in others_figures(data):
        rows.append(
            {
                "name": one.name,
                "own": one.kind == "own",
                "kind": {"baseline": "no teacher", "seed": "another seed"}.get(one.kind, ""),
                "cells": [
                    _cell(SHOWN[key].label, SHOWN[key], asdict(interval))
                    for key, interval in one.figures.items()
                ],
                "verdict": verdict("kl", asdict(one.difference)) if one.difference else "",
                "difference": SHOWN["kl"].text(one.difference.value, signed=True)
                if one.difference
                else "",
                "interval": f"{one.difference.low:+.3g} to {one.difference.high:+.3g}"
                if one.difference
                else "",
            }
        )
    columns = [SHOWN[key].label for key in ("kl", "lm_loss", "accuracy")]
    return {"rows": rows, "columns": columns, "seeds": seeds_spread(data)}


def costs(data: ReportData) -> list[tuple[str, str, str]]:
    """Name, value, remark."""
    found = data.costs
    if found is None:
        return []
    rows = [
        (
            "Training",
            f"{found.tokens:,} tokens in {duration(found.seconds)}",
            f"{found.tokens_per_second:,.0f} tokens/s on {_processes(found)}; validations and "
            "checkpoints are not counted",
        ),
        (
            "Operations",
            _unit(found.flops, "FLOP"),
            f"counted, not measured; {_unit(found.flops / found.seconds, 'FLOP/s')}",
        ),
        *(
            (f"Peak memory, {kind}", _bytes(held), "the rank that held most")
            for kind, held in found.peak_memory.items()
        ),
        _energy(found),
    ]
    if found.price is not None:
        rows.append(("Price", f"{found.price:,.4g}", "training time x evaluation.price_per_hour"))
    for model, label in ((TEACHER, "teacher"), (AFTER, "student")):
        share = found.weight_bytes[model] / found.weight_bytes[TEACHER]
        rows.append(
            (
                f"Weights of the {label}",
                _bytes(found.weight_bytes[model]),
                "as stored"
                if model == TEACHER
                else f"{percent(share)} of the teacher's, as stored",
            )
        )
        work = found.flops_a_token[model] / found.flops_a_token[TEACHER]
        rows.append(
            (
                f"A token of the {label}",
                _unit(found.flops_a_token[model], "FLOP"),
                "forward pass" if model == TEACHER else f"{percent(work)} of the teacher's",
            )
        )
    return rows


def generation(data: ReportData) -> list[tuple[str, str, str]]:
    """How fast the models write: name, value, remark."""
    rows = []
    for model, label in ((TEACHER, "teacher"), (AFTER, "student")):
        for speed in data.generation.get(model, ()):
            held = "" if speed.peak_memory is None else f", at most {_bytes(speed.peak_memory)}"
            rows.append(
                (
                    f"The {label} writes",
                    f"{speed.decode_tokens_per_second:,.3g} tokens/s",
                    f"{speed.engine}, {speed.dtype} on {speed.device}, one text at a time{held}; "
                    f"reads {speed.prompt_tokens:,} tokens at "
                    f"{speed.prefill_tokens_per_second:,.3g} tokens/s",
                )
            )
    return rows


def _processes(found: Costs) -> str:
    kind = "GPU" if found.device == "cuda" else "CPU"
    return f"{found.processes} {kind} process{'es' if found.processes > 1 else ''}"


def _energy(found: Costs) -> tuple[str, str, str]:
    if found.energy_joules is None:
        return ("Energy", "not known", found.energy_from or "the training did not say")
    kilowatt_hours = found.energy_joules / 3.6e6
    return ("Energy", f"{kilowatt_hours:.3g} kWh", found.energy_from)


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def _unit(value: float, unit: str) -> str:
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:,.0f} {unit}"


def _bytes(value: int) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value} B"
