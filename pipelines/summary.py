"""What a finished run says: its figures, its times, and where things are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flagscale.artifacts import write_json
from pipelines.steps import RunResult, duration

_MODELS = {"teacher": "teacher", "student": "student before", "distilled": "student after"}
_FIGURES = {  # name in metrics.json -> heading, decimals
    "lm_loss": ("LM loss", 3),
    "perplexity": ("perplexity", 1),
    "kl": ("KL to teacher", 3),
    "top1_agreement": ("top-1 agreement", 3),
}
_LONG = 1e5


def summary(result: RunResult) -> str:
    """The text that ends a run; the same facts are in its `summary.json`."""
    metrics = _metrics(result)
    write_json(result.folder / "summary.json", _facts(result, metrics))
    parts = [_times(result)]
    if metrics:
        parts.insert(0, _table(metrics))
    parts.append(_places(result))
    return "\n\n".join(parts)


def _metrics(result: RunResult) -> dict[str, Any]:
    step = result.steps.get("evaluate")
    path = step and step.outputs.get("results")
    if not path:
        return {}
    return json.loads((path / "metrics.json").read_text(encoding="utf-8"))


def _facts(result: RunResult, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "seconds": result.seconds,
        "tracking_uri": result.tracking_uri,
        "steps": {
            name: {
                "seconds": step.seconds,
                "reused": step.reused,
                "outputs": {output: str(path) for output, path in step.outputs.items()},
            }
            for name, step in result.steps.items()
        },
        "metrics": metrics,
    }


def _table(metrics: Mapping[str, Any]) -> str:
    percent = f"{100 * metrics['confidence']:.0f}%"
    title = (
        f"Held-out test split: {metrics['documents']} documents, {metrics['tokens']:,} tokens; "
        f"{percent} intervals over documents. Losses and KL in nats a token."
    )
    rows = [["", *(heading for heading, _ in _FIGURES.values())]]
    for model, label in _MODELS.items():
        figures = metrics["models"][model]
        rows.append([label, *(_cell(figures.get(f), d) for f, (_, d) in _FIGURES.items())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    reduction = metrics.get("kl_reduction")
    if reduction is not None:
        verb = "fell" if reduction >= 0 else "rose"
        lines.append(f"The student's KL {verb} by {abs(reduction):.1%} in training.")
    return "\n".join([title, *lines])


def _cell(figure: Mapping[str, float] | None, decimals: int) -> str:
    if figure is None:
        return "-"
    values = [figure[key] for key in ("value", "low", "high")]
    # An untrained student's perplexity has nine digits, of which three say something.
    form = ".2e" if max(values) >= _LONG else f".{decimals}f"
    value, low, high = (f"{number:{form}}" for number in values)
    return value if low == high else f"{value} [{low}, {high}]"


def _times(result: RunResult) -> str:
    lines = [
        f"  {name:<16} {'reused from cache' if step.reused else duration(step.seconds)}"
        for name, step in result.steps.items()
    ]
    return "\n".join([f"Wall time {duration(result.seconds)}:", *lines])


def _places(result: RunResult) -> str:
    lines = [("run", result.folder)]
    if "evaluate" in result.steps:
        lines.append(("report", result.folder / "evaluate-results" / "report.html"))
    if "export-student" in result.steps:
        lines.append(("student", result.folder / "export-student-model"))
    text = [f"{label:<8} {_shortest(path)}" for label, path in lines]
    if result.tracking_uri.startswith("sqlite:"):
        text.append(f"MLflow   .venv/bin/mlflow ui --backend-store-uri {result.tracking_uri}")
    else:
        text.append(f"MLflow   {result.tracking_uri}")
    return "\n".join(text)


def _shortest(path: Path) -> Path:
    """Relative to the current folder where that is below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
