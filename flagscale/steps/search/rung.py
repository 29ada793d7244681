"""A rung of a search, as distil-student is told of it; without torch, as a launcher needs it."""

from __future__ import annotations

from typing import NamedTuple

from flagscale.recipe import TasksRecipe
from flagscale.recipe.search import OfManyRecipe
from flagscale.shared import Pointer

SAMPLE_LOSSES = "sample_losses.json"  # of a `candidate` artifact


class Rung(NamedTuple):
    """Where a candidate's training stops for now.

    Attributes:
        until_step: optimiser steps since the beginning of the training.
        samples: of the validation split that it is measured on.
        student: where the `student` artifact lies, for those that go on with it.
        tasks: that it is asked; none where a loss ranks.
    """

    until_step: int
    samples: int
    student: Pointer
    tasks: TasksRecipe = TasksRecipe()

    @classmethod
    def of(cls, given: OfManyRecipe, student: Pointer) -> Rung | None:
        """The rung that a training is of; None where it goes on to its end."""
        if not given.until_step:
            return None
        return cls(given.until_step, given.samples, student, given.tasks)
