"""Part of convert-student: the student as a model, whatever it starts from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel

from flagscale.checkpoint import load_layers
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.shape import ModelShape
from flagscale.models.cut_shape import cut_shape
from flagscale.models.megatron import WEIGHTS, build_model
from flagscale.models.pretrained import Pretrained
from flagscale.models.random_weights import with_random_weights
from flagscale.recipe import StudentRecipe
from flagscale.steps.student.layer_choice import LayerChoice, choose_layers, fit_layers
from flagscale.steps.student.narrowing import Narrowing, narrow_student

logger = logging.getLogger(__name__)


@dataclass
class Made:
    """What was made, and why so.

    Attributes:
        model: this rank's part.
        choice: of the teacher's layers.
        narrowing: of them, where they were.
        zero_weights: how many are all zero, of a model of its own.
    """

    model: GPTModel
    choice: LayerChoice
    narrowing: Narrowing | None = None
    zero_weights: int = 0


def make_student(
    student: StudentRecipe,
    source: Pretrained | None,
    teacher: Path,
    dataset: Path,
    args: Arguments,
    stored: torch.dtype,
    importance: Path | None = None,
) -> Made:
    """This rank's part of the student, with weights that lose nothing when they are stored.

    Weights that were there do not anyway: the student is stored as they are. All ranks call it.

    Args:
        student: the recipe's section, its targets met.
        source: the model that the student is, if it is one of its own.
        teacher: the artifact.
        dataset: the artifact that what is measured is measured on.
        args: of the student.
        stored: dtype that the weights are to be stored in.
        importance: see `choose_layers`.
    """
    shape, teacher_shape = args.shape, ModelShape.load(teacher)
    build = partial(build_model, shape, args.seq_length, args.parallelism, args.params_dtype)
    choice = choose_layers(student, teacher, dataset, args, importance)
    if student.init == "scratch":
        made = Made(with_random_weights(build, student.seed), choice)
    elif source is not None:
        made = Made(build(), choice)
        made.zero_weights = source.fill(made.model)
    else:
        as_wide = cut_shape(teacher_shape, {"num_layers": shape.num_layers})
        model = build_model(as_wide, args.seq_length, args.parallelism, args.params_dtype)
        logger.info("keeping layers %s of %d", list(choice.kept), teacher_shape.num_layers)
        load_layers(model, teacher / WEIGHTS, choice.kept, teacher_shape.num_layers)
        fit_layers(student, model, choice)
        narrowing = None
        if shape != as_wide:
            model, narrowing = narrow_student(student, dataset, model, (as_wide, shape), build)
        made = Made(model, choice, narrowing)
    for parameter in made.model.parameters():
        parameter.data.copy_(parameter.data.to(stored))
    return made
