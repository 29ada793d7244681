"""distil-student on several nodes: the launcher, which trains nothing and loads no torch."""

from __future__ import annotations

from pathlib import Path

from flagscale.errors import UserError
from flagscale.models.shape import ModelShape
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.recipe.combinations import check_combination
from flagscale.steps.nodes import NodePods, processes_per_node, shared_folder
from flagscale.steps.trainjob import job_name, run_on_nodes
from flagscale.steps.trainjob_manifest import Nodes

_STEP = "distil-student"


def distil_student_on_nodes(
    distillation: DistillationRecipe,
    training: TrainingRecipe,
    teacher: Path,
    student: Path,
    dataset: Path,
    checkpoints: Path,
    output: Path,
    nodes: int,
    accelerator_count: int,
    pods: NodePods,
) -> dict[str, float]:
    """`distil_student`, on several nodes at once; every path must be on the shared volume.

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

    Raises:
        UserError: the training cannot be divided so, something is missing that it needs, or a rank
            failed.
        Interrupted: it was asked to stop; if the ranks had begun, they have saved a checkpoint.
    """
    processes = processes_per_node(training.parallelism, nodes, accelerator_count)
    check_training(distillation, training, student, nodes * processes)
    inputs = {"teacher": teacher, "student": student, "dataset": dataset}
    paths = {**inputs, "checkpoints": checkpoints, "output": output}
    shared = shared_folder(paths)
    sections = {
        "distillation": distillation.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
    }
    places = {name: str(path) for name, path in paths.items()}
    figures: dict[str, float] = run_on_nodes(
        _STEP,
        "flagscale.steps.distil_student:run_rank",
        {**sections, **places},
        Nodes(nodes, processes, accelerator_count, pods),
        shared,
        job_name(_STEP, [sections, places["student"], places["checkpoints"]]),
    )
    return figures


def check_training(
    distillation: DistillationRecipe, training: TrainingRecipe, student: Path, processes: int
) -> None:
    """Refuse, before any process starts, what none of them could train.

    The sections may have been changed one by one since the recipe was read.

    Args:
        distillation: the loss.
        training: the optimisation.
        student: a `student` artifact.
        processes: ranks in all.

    Raises:
        UserError: what does not go together.
    """
    try:
        check_combination(distillation, training, ModelShape.load(student).architecture)
        training.check_world_size(processes)
    except ValueError as error:
        raise UserError(str(error)) from error
