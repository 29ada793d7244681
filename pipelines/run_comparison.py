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
    from flagscale.evaluation.run_board import Student
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
    from flagscale.evaluation.run_board import boards
    from flagscale.evaluation.run_board_report import markdown, render

    names = _names(found)
    students, notes = [], []
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
    from flagscale.evaluation import METRICS, PER_DOCUMENT
    from flagscale.evaluation.fidelity import read_rows
    from flagscale.evaluation.run_board import Student
    from flagscale.tracking import flatten

    files = history.download(one.run_id, (MANIFEST, METRICS, PER_DOCUMENT), folder)
    if len(files) < 3:
        return None
    manifest, metrics = (
        json.loads(files[file].read_text(encoding="utf-8")) for file in (MANIFEST, METRICS)
    )
    lines = files[PER_DOCUMENT].read_text(encoding="utf-8").splitlines()
    measured: Mapping[str, Any] = manifest["facts"].get("measured", {})
    recipe = measured.get("recipe", {})
    sections = {**one.params, **flatten(recipe)}
    sections = {k: v for k, v in sections.items() if not k.endswith(".fingerprint")}
    return Student(
        name=name,
        run_id=one.run_id,
        sections=sections,
        origin=digest(recipe.get("student", {})),
        metrics=metrics,
        fidelity=read_rows([json.loads(line) for line in lines]),
        axes=_axes(metrics, recipe, measured.get("training", {}), sections, one.figures),
        digests={"distilled": manifest["parents"]["distilled"]},
    )


def _axes(
    metrics: Mapping[str, Any],
    recipe: Mapping[str, Any],
    training: Mapping[str, Any],
    sections: Mapping[str, str],
    figures: Mapping[str, Mapping[str, float]],
) -> dict[str, float]:
    """What is known of the student's size, speed and cost."""
    found = {"parameters": float(metrics["parameters"]["distilled"])}
    speed = figures.get("evaluate-tasks", {}).get("distilled/decode_tokens_per_second")
    if speed:
        found["tokens_per_second"] = speed
    steps, rate = training.get("steps"), training.get("median tokens per second")
    batch = recipe.get("training", {}).get("global_batch_size")
    if steps and rate and batch and "data.seq_length" in sections:
        found["training_seconds"] = steps * batch * int(sections["data.seq_length"]) / rate
    return found
