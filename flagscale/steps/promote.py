"""promote: a student that shows what its recipe asks -> an alias of MLflow's model registry."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from flagscale import tracking
from flagscale.artifacts import Manifest, new_artifact, open_artifact, write_json
from flagscale.errors import UserError
from flagscale.evaluation import GATE, GATE_TABLE
from flagscale.evaluation.compare import read_evaluation
from flagscale.evaluation.gate import Judgement, judge, markdown
from flagscale.evaluation.tasks.scores import KIND as TASK_EVALUATION
from flagscale.evaluation.tasks.scores import load_scores
from flagscale.execution.metrics_file import read_metrics
from flagscale.recipe import PromoteRecipe
from flagscale.tracking import aliases
from flagscale.tracking.server import tracking_uri

logger = logging.getLogger(__name__)

_TAG = "flagscale.gate"  # of a version: what its gate found


def promote(
    asked: PromoteRecipe,
    evaluation: Path,
    exported: Manifest,
    export_metrics: Path,
    output: Path,
    tasks: Path | None = None,
) -> dict[str, float]:
    """Judge a student by the recipe's conditions; move the alias to it if all of them hold.

    A student that does not pass is no error: the alias stays where it is. Without a tracking server
    there is no alias, and the conditions are judged all the same.

    Args:
        asked: the recipe's section.
        evaluation: the `evaluation` artifact of the student.
        exported: manifest of its `export` artifact.
        export_metrics: file of the figures of the step that exported it, which says in which run
            of MLflow it registered the student.
        output: folder of the `promotion` artifact: gate.json and gate.md.
        tasks: its `task-evaluation` artifact, if it was asked tasks.

    Returns:
        `promoted`: 1 if all conditions hold and the alias, if there is a registry, points to this
        student; `conditions`, and how many of them `hold`.

    Raises:
        UserError: the artifacts do not belong together, a figure was not measured, or the student
            passes and the alias cannot be moved.
    """
    parents = _open(evaluation, exported, tasks)
    recipe = {"promote": asked.model_dump(mode="json")}
    metrics, fidelity = read_evaluation(evaluation)
    with (
        tracking.step_run("promote", recipe, parents=parents) as run,
        new_artifact(output, "promotion", recipe, parents, run.log_manifest) as staging,
    ):
        judged = judge(
            asked.parsed, metrics, fidelity, load_scores(tasks) if tasks is not None else ()
        )
        held = [one.holds for one in judged]
        moved = _move(asked.alias, judged, read_metrics(export_metrics, "export-student").run_id)
        outcome = _outcome(judged, asked.alias, moved)
        facts = {"promoted": all(held), "outcome": outcome, "alias": asked.alias, **moved}
        write_json(staging.path / GATE, {**facts, "conditions": [one.as_json() for one in judged]})
        (staging.path / GATE_TABLE).write_text(markdown(judged, outcome), encoding="utf-8")
        staging.facts = facts
        figures = {"promoted": all(held), "conditions": len(held), "hold": sum(held)}
        run.log_metrics(figures)
        for name in (GATE, GATE_TABLE):
            run.log_artifact(staging.path / name)
    logger.info("%s", outcome)
    return {name: float(value) for name, value in figures.items()}


def _open(evaluation: Path, exported: Manifest, tasks: Path | None) -> dict[str, Manifest]:
    """Check that all of it is about one student.

    Raises:
        UserError: what is of another.
    """
    parents = {"evaluation": open_artifact(evaluation, "evaluation"), "export": exported}
    if exported.kind != "export":
        raise UserError(f"exported_student: is a {exported.kind!r}, but an 'export' is needed")
    if tasks is not None:
        parents["tasks"] = open_artifact(tasks, TASK_EVALUATION)
    digests = {manifest.digest for manifest in parents.values()}
    for name, manifest in parents.items():
        measured = manifest.parents.get("evaluation")
        if measured is not None and measured not in digests:
            raise UserError(
                f"{name}: was made from another evaluation ({measured}) than {evaluation} "
                f"({parents['evaluation'].digest}); give the artifacts of one run"
            )
    return parents


def _move(alias: str, judged: Sequence[Judgement], run_id: str | None) -> dict[str, str | None]:
    """Tell the registry.

    Returns:
        `model`: the student's version, `before`: the one that had the alias; None where there is
        none.
    """
    model = aliases.registered_by(run_id)
    failed = [one.condition for one in judged if not one.holds]
    told = {_TAG: f"does not hold: {'; '.join(failed)}" if failed else "all conditions hold"}
    if failed:
        if model is not None:
            aliases.note(model, told)
        return {"model": model, "before": None}
    if model is not None:
        return {"model": model, "before": aliases.promote(model, alias, told)}
    if not tracking_uri():
        return {"model": None, "before": None}
    raise UserError(
        f"all conditions hold, but MLflow has no version of this student for the alias {alias}: "
        f"export-student registered none in run {run_id}; look at its log, and run it again "
        "without the cache"
    )


def _outcome(judged: Sequence[Judgement], alias: str, moved: Mapping[str, str | None]) -> str:
    failed = sum(not one.holds for one in judged)
    model, before = moved["model"], moved["before"]
    if failed:
        return f"Not promoted: {failed} of {len(judged)} conditions do not hold"
    if model is None:
        return f"All {len(judged)} conditions hold; there is no MLflow whose {alias} it could be"
    if before is None or before == model:
        return f"Promoted: {model} is the {alias}"
    return f"Promoted: {model} is the {alias}, after {before}"
