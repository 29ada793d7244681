"""A rung of a search, as distil-student is told of it; without torch, as a launcher needs it."""

from __future__ import annotations

from typing import NamedTuple

from flagscale.recipe.search import OfManyRecipe
from flagscale.shared import Pointer

SAMPLE_LOSSES = "sample_losses.json"  # of a `candidate` artifact


class Rung(NamedTuple):
    """Where a candidate's training stops for now.

    Attributes:
        until_step: optimiser steps since the beginning of the training.
        samples: of the validation split that it is measured on.
        student: where the `student` artifact lies, for those that go on with it.
    """

    until_step: int
    samples: int
    student: Pointer

    @classmethod
    def of(cls, given: OfManyRecipe, student: Pointer) -> Rung | None:
        """The rung that a training is of; None where it goes on to its end."""
        return cls(given.until_step, given.samples, student) if given.until_step else None
