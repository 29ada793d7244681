"""Runs that MLflow knows, side by side: their students on a leaderboard, as text and as a page."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale.errors import UserError

if TYPE_CHECKING:
    from flagscale.evaluation.boards.run_board import Student
    from flagscale.evaluation.tasks.scores import TaskScores
    from flagscale.tracking.finished import Evaluated, History

PAGE = "comparison.html"
_SHORT = 8  # characters of a run's id


def compare_experiment(name: str, metric: str, runs: Path, page: Path | None = None) -> str:
    """All students of an experiment.

    Args:
        name: of the experiment.
        metric: figure of the evaluation that orders.
        runs: folder of `mlflow.db`, read unless `MLFLOW_TRACKING_URI` is set.
        page: of the HTML page; None: in `runs`.

    Returns:
        The leaderboard as Markdown, and where the page is.

    Raises:
        UserError: there is no such experiment, or nothing to compare in it.
    """
    from flagscale.tracking.finished import History

    history = History(runs)
    return _compare(history, history.of_experiment(name), name, metric, page or runs / PAGE)


def compare_runs(ids: Sequence[str], metric: str, runs: Path, page: Path | None = None) -> str:
    """The students of some runs, of pipelines or of their steps `evaluate`.

    Args:
        ids: of MLflow.
        metric: see `compare_experiment`.
        runs: see there.
        page: see there.

    Raises:
        UserError: there is no such run, or the students cannot be compared.
    """
    from flagscale.evaluation.compare import check_same
    from flagscale.tracking.finished import History

    history = History(runs)

    def check(students: Sequence[Student]) -> None:
        first = students[0]
        for other in students[1:]:
            check_same(
                Path(f"run {first.name}"),
                Path(f"run {other.name}"),
                first.metrics,
                other.metrics,
                first.fidelity,
                other.fidelity,
            )

    title = " and ".join(one[:_SHORT] for one in ids)
    return _compare(history, history.of_runs(ids), title, metric, page or runs / PAGE, check)


def _compare(
    history: History,
    found: Sequence[Evaluated],
    title: str,
    metric: str,
    page: Path,
    check: Any = None,  # noqa: ANN401 - of the students, or nothing
) -> str:
    from flagscale.evaluation.boards.run_board import boards
    from flagscale.evaluation.boards.run_board_page import markdown, render

    names = _names(found)
    students: list[Student] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="flagscale-compare-") as folder:
        for name, one in zip(names, found, strict=True):
            student = _student(history, one, name, Path(folder) / one.run_id)
            if student is None:
                notes.append(f"Left out: {name}, whose evaluation is not in MLflow.")
            else:
                students.append(student)
    if len(students) < 2:
        raise UserError(
            f"{title} at {history.place}: has {len(students)} student(s) to compare, at least 2 "
            f"are needed. {' '.join(notes)}".strip()
        )
    if check is not None:
        check(students)
    sided = boards(students, metric)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(sided, title, notes), encoding="utf-8")
    return f"{markdown(sided, notes)}\npage     {page}"


def _names(found: Sequence[Evaluated]) -> list[str]:
    """Of the pipeline's run, with as much of an id as tells them apart.

    That of the pipeline's run where it has one student, else that of the evaluation.
    """
    counts = Counter(one.pipelines[0] for one in found if one.pipelines)
    ids = [
        one.pipelines[0] if one.pipelines and counts[one.pipelines[0]] == 1 else one.run_id
        for one in found
    ]
    return [f"{one.name} {run_id[:_SHORT]}" for one, run_id in zip(found, ids, strict=True)]


def _student(history: History, one: Evaluated, name: str, folder: Path) -> Student | None:
    """What the run has measured; None where it has not kept its evaluation."""
    from flagscale.artifacts import MANIFEST, digest
    from flagscale.evaluation import METRICS, PER_DOCUMENT, REPORT_DATA
    from flagscale.evaluation.boards.run_board import Student
    from flagscale.evaluation.fidelity import read_rows
    from flagscale.tracking import flatten

    files = history.download(one.run_id, (MANIFEST, METRICS, PER_DOCUMENT, REPORT_DATA), folder)
    if not {MANIFEST, METRICS, PER_DOCUMENT} <= {*files}:
        return None
    found = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in files.items()
        if name != PER_DOCUMENT
    }
    manifest, metrics = found[MANIFEST], found[METRICS]
    lines = files[PER_DOCUMENT].read_text(encoding="utf-8").splitlines()
    recipe = manifest["facts"].get("measured", {}).get("recipe", {})
    sections = {**one.params, **flatten(recipe)}
    return Student(
        name=name,
        run_id=one.run_id,
        sections={k: v for k, v in sections.items() if not k.endswith(".fingerprint")},
        origin=digest(recipe.get("student", {})),
        metrics=metrics,
        fidelity=read_rows([json.loads(line) for line in lines]),
        axes=_axes(metrics, found.get(REPORT_DATA, {}).get("costs") or {}, one.figures),
        digests={"distilled": manifest["parents"]["distilled"]},
        tasks=_tasks(history, one, folder / "tasks"),
    )


def _tasks(history: History, one: Evaluated, folder: Path) -> tuple[TaskScores, ...]:
    """What it scored on tasks; nothing where it was not asked any."""
    from flagscale.evaluation.tasks.scores import PER_EXAMPLE, TASKS, read_scores

    if "evaluate-tasks" not in one.steps:
        return ()
    files = history.download(one.steps["evaluate-tasks"], (TASKS, PER_EXAMPLE), folder)
    return read_scores(folder) if len(files) == 2 else ()


def _axes(
    metrics: Mapping[str, Any],
    costs: Mapping[str, Any],
    figures: Mapping[str, Mapping[str, float]],
) -> dict[str, float]:
    """What is known of the student's size, speed and cost.

    Args:
        metrics: of its evaluation.
        costs: as the report has them (`flagscale.evaluation.report.costs`); empty where nothing
            is known.
        figures: of other steps.
    """
    known = {
        "exported_bytes": figures.get("export-student", {}).get("bytes"),
        "parameters": metrics["parameters"]["distilled"],
        "decode_tokens_per_second": figures.get("evaluate-tasks", {}).get(
            "distilled/decode_tokens_per_second"
        ),
        "flops_a_token": costs.get("flops_a_token", {}).get("distilled"),
        "price": costs.get("price"),
        "training_rank_seconds": costs["seconds"] * costs["processes"] if costs else None,
    }
    return {name: float(value) for name, value in known.items() if value is not None}
