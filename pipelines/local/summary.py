"""What a finished run says: its figures, its times, and where things are."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from flagscale.artifacts import write_json
from flagscale.evaluation import GATE, LEADERBOARD, LINEAGE, METRICS, SEARCH
from pipelines.local.steps import RunResult, step_of
from pipelines.outcome import duration

_MODELS = {"teacher": "teacher", "student": "student before", "distilled": "student after"}
_FIGURES = {  # name in metrics.json -> heading, decimals
    "lm_loss": ("LM loss", 3),
    "perplexity": ("perplexity", 1),
    "kl": ("KL to teacher", 3),
    "top1_agreement": ("top-1 agreement", 3),
}
_DECISIVE = {**_FIGURES, "accuracy": ("token accuracy", 3)}
_LONG = 1e5
_MLFLOW_UI = "http://127.0.0.1:5000"  # where `mlflow ui` says that it is


def summary(result: RunResult) -> str:
    """The text that ends a run; the same facts are in its `summary.json`."""
    metrics = _read(result, "evaluate", "evaluation", METRICS)
    board = _read(result, "leaderboard", "leaderboard", LEADERBOARD)
    search = _search(result)
    facts = _facts(result) | {"metrics": metrics} | ({"leaderboard": board} if board else {})
    facts |= {"search": search} if search else {}
    gate = _read(result, "promote", "promotion", GATE)
    facts |= {"gate": gate} if gate else {}
    write_json(result.folder / "summary.json", facts)
    parts = [_times(result), _places(result)]
    if gate:
        parts.insert(0, _gate(gate))
    if metrics:
        parts.insert(0, _table(metrics))
    if board:
        parts.insert(0, _leaderboard(board))
    if search:
        parts.insert(0, _candidates(search))
    return "\n\n".join(parts)


def _read(result: RunResult, step: str, output: str, file: str) -> dict[str, Any]:
    """What a step wrote, empty where there was no such step."""
    if step not in result.steps or output not in result.steps[step].outputs:
        return {}
    path = result.steps[step].outputs[output] / file
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _facts(result: RunResult) -> dict[str, Any]:
    return {
        "seconds": result.seconds,
        "tracking_uri": result.tracking_uri,
        "steps": {
            name: {
                "seconds": step.seconds,
                "reused": step.reused,
                "outputs": {output: str(path) for output, path in step.outputs.items()},
                **({"variant": step.variant} if step.variant else {}),
            }
            for name, step in result.steps.items()
        },
    }


def _table(metrics: Mapping[str, Any]) -> str:
    rows = [["", *(heading for heading, _ in _FIGURES.values())]]
    for model, label in _MODELS.items():
        figures = metrics["models"][model]
        rows.append([label, *(_cell(figures.get(f), d) for f, (_, d) in _FIGURES.items())])
    lines = _columns(rows)
    reduction = metrics.get("kl_reduction")
    if reduction is not None:
        verb = "fell" if reduction >= 0 else "rose"
        lines.append(f"The student's KL {verb} by {abs(reduction):.1%} in training.")
    return "\n".join([_measured(metrics), *lines])


def _leaderboard(board: Mapping[str, Any]) -> str:
    """The variants, best first."""
    metric = board["metric"]
    shown = {metric: _DECISIVE[metric], **_FIGURES}
    rows = [["", "", *(heading for heading, _ in shown.values()), "beside the best"]]
    for row in board["rows"]:
        cells = [_cell(row["figures"][f], decimals) for f, (_, decimals) in shown.items()]
        rows.append([str(row["rank"]), row["name"], *cells, row["verdict"]])
    for name, figures in board["references"].items():
        cells = [_cell(figures[f], decimals) for f, (_, decimals) in shown.items()]
        rows.append(["", name, *cells, ""])
    failed = [f"failed: {one['name']}: {one['error']}" for one in board.get("failed", ())]
    best = f"The best by {shown[metric][0]} is exported: {board['rows'][0]['name']}."
    return "\n".join([_measured(board), *_columns(rows), *failed, best])


def _gate(gate: Mapping[str, Any]) -> str:
    """What the recipe asked of the student, and what came of it."""
    rows = [["", "holds", "by"]]
    for one in gate["conditions"]:
        rows.append([one["condition"], "yes" if one["holds"] else "no", _cell(one["margin"], 3)])
    return "\n".join([f"{gate['outcome']}.", *_columns(rows)])


def _search(result: RunResult) -> dict[str, Any]:
    """What the last ranking of a search wrote; empty where there was none."""
    ranked = [name for name in result.steps if step_of(name) == "rank-candidates"]
    return _read(result, ranked[-1], "search", SEARCH) if ranked else {}


def _candidates(search: Mapping[str, Any]) -> str:
    """The candidates, best first, with their losses of each rung."""
    rungs = range(1, search["rung"] + 1)
    rows = [["", "", *(f"rung {rung}" for rung in rungs), ""]]
    for place, one in enumerate(search["candidates"], start=1):
        losses = {point["rung"]: f"{point['loss']['value']:.4f}" for point in one["points"]}
        outcome = f"{one['status']}: {one['why']}" if one["why"] else "trained to the end"
        rows.append([str(place), one["name"], *(losses.get(r, "-") for r in rungs), outcome])
    title = (
        f"Held-out {search['metric'].replace('_', ' ')} of the candidates, nats a token, on "
        f"{search['samples']} samples:"
    )
    return "\n".join([title, *_columns(rows)])


def _measured(metrics: Mapping[str, Any]) -> str:
    return (
        f"Held-out test split: {metrics['documents']} documents, {metrics['tokens']:,} tokens; "
        f"{100 * metrics['confidence']:.0f}% intervals over documents. Losses and KL in nats a "
        "token."
    )


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def _cell(figure: Mapping[str, float] | None, decimals: int) -> str:
    if figure is None:
        return "-"
    values = [figure[key] for key in ("value", "low", "high")]
    # An untrained student's perplexity has nine digits, of which three say something.
    form = ".2e" if max(values) >= _LONG else f".{decimals}f"
    value, low, high = (f"{number:{form}}" for number in values)
    return value if low == high else f"{value} [{low}, {high}]"


def _times(result: RunResult) -> str:
    width = max(16, *(len(name) for name in result.steps), 0)
    lines = [
        f"  {name:<{width}} {'reused from cache' if step.reused else duration(step.seconds):<18}"
        f"{step.variant}".rstrip()
        for name, step in result.steps.items()
    ]
    return "\n".join([f"Wall time {duration(result.seconds)}:", *lines])


def _places(result: RunResult) -> str:
    lines = [("run", result.folder)]
    if "evaluate" in result.steps:  # evaluate-tasks renders it again, with the tasks
        where = "task_evaluation" if "evaluate-tasks" in result.steps else "evaluation"
        lines.append(("report", result.folder / where / "report.html"))
    if "leaderboard" in result.steps:
        lines.append(("report", result.folder / "leaderboard" / "report.html"))
    ranked = [name for name in result.steps if step_of(name) == "rank-candidates"]
    if ranked:
        lines.append(("search", result.steps[ranked[-1]].outputs["search"] / "report.html"))
    for name in ("export-student", "export-winner"):
        if name in result.steps:
            lines.append(("student", result.folder / "exported_student"))
            lines += _lineage(result, name)
    text = [f"{label:<8} {_shortest(path)}" for label, path in lines]
    if result.tracking_uri.startswith("sqlite:"):
        uri = quote(result.tracking_uri)
        text.append(f"MLflow   .venv/bin/mlflow ui --backend-store-uri {uri}")
        text.append(f"         then {_MLFLOW_UI}{result.tracking_page}")
    else:
        text.append(f"MLflow   {result.tracking_uri.rstrip('/')}{result.tracking_page}")
    return "\n".join(text)


def _lineage(result: RunResult, step: str) -> list[tuple[str, Path]]:
    """Where its page is, with the ending by which browsers know one: KFP's file has none."""
    written = result.steps[step].outputs.get(LINEAGE.removesuffix(".html"))
    if written is None:
        return []
    shown = result.folder / LINEAGE
    shutil.copyfile(written, shown)
    return [("lineage", shown)]


def _shortest(path: Path) -> Path:
    """Relative to the current folder where that is below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
