"""Who is told how training goes: the progress and MLflow, or nobody."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flagscale import tracking
from flagscale.execution import launch
from flagscale.recipe import TrainingRecipe
from flagscale.train.checkpoints import TrainingState
from flagscale.train.progress import Progress

_WHILE_IT_TRAINS = "{path}, while the training goes on; its step's output has the weights it keeps"


@contextmanager
def observer(
    run: tracking.StepRun,
    state: TrainingState,
    training: TrainingRecipe,
    validation: tracking.Split | None = None,
) -> Iterator[_Observers | _Silence]:
    """Who is told, while the body trains: on the first rank everybody, elsewhere nobody.

    Args:
        run: the step's run in MLflow.
        state: where training goes on.
        training: the recipe's section.
        validation: what is validated on.
    """
    if not launch.is_first_rank():
        yield _Silence()
        return
    curves = tracking.Curves(run, training.train_iters, training.eval_interval)
    with Progress(state.step, training.train_iters) as progress:
        yield _Observers(progress, run, curves, state, validation)


class _Observers:
    """Passes every record on to the progress and to MLflow."""

    def __init__(
        self,
        progress: Progress,
        run: tracking.StepRun,
        curves: tracking.Curves,
        state: TrainingState,
        validation: tracking.Split | None,
    ) -> None:
        """Give MLflow the curve up to here first, so that a resumed run shows all of it."""
        self._progress, self._run, self._curves = progress, run, curves
        self._validation = validation
        self._kept: list[Path] = []
        if state.step:
            run.mark_resumed()
        for record in state.training:
            curves.trained(record)
        for record in state.validation:
            curves.validated(record)

    def trained(self, record: dict[str, float]) -> None:
        self._progress.trained(record)
        self._curves.trained(record)

    def validated(self, record: dict[str, float]) -> None:
        self._progress.validated(record)
        self._curves.validated(record)

    def kept(self, checkpoints: Sequence[Path]) -> None:
        if checkpoints == self._kept:
            return
        self._kept = list(checkpoints)
        self._run.keep_checkpoints([self._model(path) for path in checkpoints])

    def _model(self, path: Path) -> tracking.Model:
        step = int(path.name.removeprefix("step-"))
        return tracking.Model(
            path.name,
            step,
            _WHILE_IT_TRAINS.format(path=path),
            points=self._curves.validation_of(step),
            split=self._validation,
            is_checkpoint=True,
        )

    def validation_of(self, step: int) -> Sequence[tracking.Point]:
        return self._curves.validation_of(step)


class _Silence:
    """The observer of ranks that do not speak."""

    def trained(self, record: dict[str, float]) -> None:
        pass

    def validated(self, record: dict[str, float]) -> None:
        pass

    def kept(self, checkpoints: Sequence[Path]) -> None:
        pass

    def validation_of(self, step: int) -> Sequence[tracking.Point]:
        return ()
