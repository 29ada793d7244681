"""measure-layers: which of the teacher's layers can go, once for all students of a run that ask.

A greedy choice of layers takes minutes. Students that differ in something else (how many layers
go, reconstruction, widths) ask for the same one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from flagscale.artifacts import Manifest, digest, open_artifact, write_json
from flagscale.errors import UserError
from flagscale.execution.launch import call_on_ranks, is_first_rank
from flagscale.megatron import platform
from flagscale.megatron.arguments import model_arguments
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import load_model
from flagscale.models.student_shape import num_layers
from flagscale.models.targets import meet_targets
from flagscale.recipe import ModelsRecipe, StudentRecipe
from flagscale.steps.on_ranks import tracked, written
from flagscale.steps.student.layer_choice import calibration_text
from flagscale.steps.student.measured_layers import FILE, KIND, as_file, asked_by, measure

logger = logging.getLogger(__name__)


class _Asked(NamedTuple):
    """A measurement that is to be made.

    Attributes:
        student: one of those that ask for it.
        gone: the most layers that go of any of them.
    """

    student: StudentRecipe
    gone: int


def measure_layers(
    students: Sequence[StudentRecipe],
    teacher: Path,
    dataset: Path,
    output: Path,
    models: ModelsRecipe = ModelsRecipe(),
) -> dict[str, float]:
    """Measure what students ask for, each once.

    Args:
        students: those of a run that measure layers; the others are passed over.
        teacher: a `teacher` artifact.
        dataset: a `dataset` artifact, whose train split is measured on.
        output: the `layer-importance` artifact to write.
        models: how the step is spread over processes.

    Returns:
        `measurements`, and the `tokens` of all their texts.

    Raises:
        UserError: an input is missing or damaged.
    """
    _parents(teacher, dataset, check_files=True)
    return call_on_ranks(
        "measure-layers",
        measure_on_rank,
        models.processes,
        students=list(students),
        teacher=teacher,
        dataset=dataset,
        output=output,
        models=models,
    )


def measure_on_rank(
    students: list[StudentRecipe], teacher: Path, dataset: Path, output: Path, models: ModelsRecipe
) -> dict[str, float]:
    """The work of one rank, or of the only process; see `measure_layers`."""
    parents = _parents(teacher, dataset, check_files=False)
    shape, seq_length = ModelShape.load(teacher), parents["dataset"].facts["seq_length"]
    asked = _asked(students, shape)
    stored = getattr(torch, parents["teacher"].facts.get("dtype", "float32"))
    dtype = platform.inference_dtype(stored)
    args = model_arguments(shape, seq_length, parallelism=models.sizes, params_dtype=dtype)
    recipe = {"measured": [{**asked_by(one.student), "layers gone": one.gone} for one in asked]}
    with (
        tracked("measure-layers", recipe, parents=parents) as run,
        platform.runtime(parallelism=models.sizes),
        written(output, KIND, recipe, parents, run) as staging,
    ):
        found = []
        model = load_model(teacher, seq_length, args.parallelism, dtype) if asked else None
        for student, gone in asked:
            assert model is not None, "something is asked"
            text = calibration_text(student.measured_tokens, student.seed, dataset)
            found.append((student, measure(student, teacher, args, model, text, gone)))
        tokens = sum(one.importance.tokens for _, one in found)
        figures = {"measurements": float(len(found)), "tokens": float(tokens)}
        if is_first_rank():
            write_json(staging.path / FILE, as_file(found))
            staging.facts = dict(figures)
            run.log_metrics(figures)
    return figures


def _parents(teacher: Path, dataset: Path, *, check_files: bool) -> dict[str, Manifest]:
    return {
        "teacher": open_artifact(teacher, "teacher", check_files),
        "dataset": open_artifact(dataset, "dataset", check_files),
    }


def _asked(students: Sequence[StudentRecipe], teacher: ModelShape) -> list[_Asked]:
    """Each measurement once, in the order in which students ask."""
    found: dict[str, _Asked] = {}
    for student in students:
        gone = _gone(student, teacher)
        if gone <= 0:
            continue
        key = digest(asked_by(student))
        if key not in found or found[key].gone < gone:
            found[key] = _Asked(student, gone)
    return list(found.values())


def _gone(student: StudentRecipe, teacher: ModelShape) -> int:
    """How many layers go of the teacher's for it; none of one that will be refused."""
    if not student.measures_layers:
        return 0
    try:
        return teacher.num_layers - num_layers(teacher.num_layers, meet_targets(teacher, student))
    except UserError as error:
        logger.info("a student that cannot be made: %s", error)
        return 0
