"""distil-student as a TrainJob: the launcher, which trains nothing and loads no torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from flagscale.artifacts import open_artifact
from flagscale.execution.step_process import keep_exclusive, when_published
from flagscale.execution.trainjob.manifest import Nodes
from flagscale.execution.trainjob.nodes import NodePods, processes_per_node, shared_folder
from flagscale.execution.trainjob.run import job_name, run_on_nodes
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.steps.outputs.check import check_outputs, outputs_to_read
from flagscale.steps.search.rung import Rung
from flagscale.steps.training.checks import check_training
from flagscale.steps.training.fingerprint import fingerprint, sections
from flagscale.teacher_outputs import KIND, TeacherOutputs

_STEP = "distil-student"


def distil_student_on_nodes(
    distillation: DistillationRecipe,
    training: TrainingRecipe,
    teacher: Path,
    student: Path,
    dataset: Path,
    checkpoints: str | Path,
    output: Path,
    nodes: int,
    accelerator_count: int,
    pods: NodePods,
    teacher_outputs: Path | None = None,
    rung: Rung | None = None,
) -> dict[str, float]:
    """`distil_student`, in pods of its own, one a node; every path must be on the shared volume.

    Args:
        distillation: see `distil_student`.
        training: see `distil_student`; `parallelism.processes` is for each node.
        teacher: see `distil_student`.
        student: see `distil_student`.
        dataset: see `distil_student`.
        checkpoints: see `distil_student`.
        output: see `distil_student`.
        nodes: pods that train together.
        accelerator_count: of each.
        pods: what else each gets.
        teacher_outputs: see `distil_student`.
        rung: see `distil_student`.

    Raises:
        UserError: the training cannot be divided so, something is missing that it needs, or a rank
            failed.
        Interrupted: it was asked to stop; if the ranks had begun, they have saved a checkpoint.
    """
    processes = processes_per_node(training.parallelism, nodes, accelerator_count)
    check_training(distillation, training, student, nodes * processes)
    outputs = outputs_to_read(distillation, teacher_outputs)
    inputs = {"teacher": teacher, "student": student, "dataset": dataset}
    paths: dict[str, str | Path] = {**inputs, "checkpoints": checkpoints, "output": output}
    if outputs is not None:
        paths["teacher_outputs"] = outputs
    shared = shared_folder(paths)
    recipe = sections(distillation, training)
    parents = {kind: open_artifact(path, kind, check_files=False) for kind, path in inputs.items()}
    if outputs is not None:
        check_outputs(outputs, distillation, training, teacher, parents)
        parents[KIND] = TeacherOutputs.open(outputs).manifest
    name = fingerprint(recipe, parents)
    keep_exclusive(f"{checkpoints}/{name}")
    request: dict[str, Any] = {
        **recipe,
        "paths": {place: str(path) for place, path in paths.items()},
    }
    if rung is not None:
        request["rung"] = to_jsonable_python(rung)
    figures: dict[str, float] = run_on_nodes(
        _STEP,
        "flagscale.steps.distil_student:distil_on_rank",
        request,
        Nodes(nodes, processes, accelerator_count, pods),
        shared,
        job_name(_STEP, [name, str(checkpoints), *([str(rung.until_step)] if rung else [])]),
    )
    if rung is None:
        when_published(lambda: shutil.rmtree(Path(checkpoints, name), ignore_errors=True))
    return figures
