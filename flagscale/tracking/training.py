"""A training in MLflow: its curves, and a model for each checkpoint that it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flagscale.tracking.curves import Curves
from flagscale.tracking.inputs import Split
from flagscale.tracking.letters import Point
from flagscale.tracking.models import Model
from flagscale.tracking.run import StepRun

if TYPE_CHECKING:
    from flagscale.recipe import TrainingRecipe

_WHILE_IT_TRAINS = "{path}, while the training goes on; its step's output has the weights it keeps"


class TrackedTraining:
    """What a run is told of one. No method waits for the server."""

    def __init__(self, run: StepRun, training: TrainingRecipe, validation: Split | None) -> None:
        """Tell a run.

        Args:
            run: the step's.
            training: the recipe's section.
            validation: what is validated on.
        """
        self._curves = Curves(run, training.train_iters, training.eval_interval)
        self._run, self._validation = run, validation
        self._kept: list[Path] = []

    def begin(
        self,
        step: int,
        training: Sequence[Mapping[str, float]],
        validation: Sequence[Mapping[str, float]],
    ) -> None:
        """Tell the curves up to here, so that a run that goes on for another shows all of them.

        Args:
            step: after which the training goes on.
            training: one record a step.
            validation: one record a validation.
        """
        if step:
            self._run.mark_resumed()
        for record in training:
            self.trained(record)
        for record in validation:
            self.validated(record)

    def trained(self, record: Mapping[str, float]) -> None:
        """Tell of a step."""
        self._curves.trained(record)

    def validated(self, record: Mapping[str, float]) -> None:
        """Tell of a validation."""
        self._curves.validated(record)

    def validation_of(self, step: int) -> list[Point]:
        """The step's validation figures, as they were told."""
        return self._curves.validation_of(step)

    def kept(self, checkpoints: Sequence[Path]) -> None:
        """These checkpoints are there; told when they are others than before."""
        if checkpoints == self._kept:
            return
        self._kept = list(checkpoints)
        self._run.keep_checkpoints([self._model(path) for path in checkpoints])

    def _model(self, path: Path) -> Model:
        step = int(path.name.removeprefix("step-"))
        return Model(
            path.name,
            step,
            _WHILE_IT_TRAINS.format(path=path),
            points=self._curves.validation_of(step),
            split=self._validation,
            is_checkpoint=True,
        )
