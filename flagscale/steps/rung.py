"""A rung of a search, as distil-student is told of it; without torch, as a launcher needs it."""

from __future__ import annotations

from typing import NamedTuple

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
