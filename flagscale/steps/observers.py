"""Who is told how training goes: the progress, MLflow and Kubeflow Trainer, or nobody."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flagscale import tracking
from flagscale.execution import launch
from flagscale.execution.trainjob.status import TrainJobStatus
from flagscale.recipe import TrainingRecipe
from flagscale.train.checkpoints import TrainingState
from flagscale.train.progress import Progress

_WHILE_IT_TRAINS = "{path}, while the training goes on; its step's output has the weights it keeps"


@contextmanager
def observer(
    run: tracking.StepRun,
    state: TrainingState,
    training: TrainingRecipe,
    last_step: int,
    validation: tracking.Split | None = None,
) -> Iterator[_Observers | _Silence]:
    """Who is told, while the body trains: on the first rank everybody, elsewhere nobody.

    Args:
        run: the step's run in MLflow.
        state: where training goes on.
        training: the recipe's section.
        last_step: after which this process ends.
        validation: what is validated on.
    """
    if not launch.is_first_rank():
        yield _Silence()
        return
    told = TrackedTraining(run, state, training, validation)
    with Progress(state.step, last_step) as progress, TrainJobStatus() as status:
        yield _Observers(progress, status, last_step, told)


class TrackedTraining:
    """A training's run in MLflow."""

    def __init__(
        self,
        run: tracking.StepRun,
        state: TrainingState,
        training: TrainingRecipe,
        validation: tracking.Split | None,
    ) -> None:
        """Give MLflow the curve up to here first, so that a resumed run shows all of it."""
        self.curves = tracking.Curves(run, training.train_iters, training.eval_interval)
        self._run, self._validation = run, validation
        self._kept: list[Path] = []
        if state.step:
            run.mark_resumed()
        for record in state.training:
            self.curves.trained(record)
        for record in state.validation:
            self.curves.validated(record)

    def kept(self, checkpoints: Sequence[Path]) -> None:
        """These checkpoints are there; told when they are others than before."""
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
            points=self.curves.validation_of(step),
            split=self._validation,
            is_checkpoint=True,
        )


class _Observers:
    """Passes every record on to the progress, to MLflow and to Trainer."""

    def __init__(
        self,
        progress: Progress,
        status: TrainJobStatus,
        last_step: int,
        tracked: TrackedTraining,
    ) -> None:
        self._progress, self._tracked = progress, tracked
        self._status, self._last_step = status, last_step

    def trained(self, record: dict[str, float]) -> None:
        self._progress.trained(record)
        self._tracked.curves.trained(record)
        self._tell("train", record)

    def validated(self, record: dict[str, float]) -> None:
        self._progress.validated(record)
        self._tracked.curves.validated(record)
        self._tell("validation", record)

    def _tell(self, prefix: str, record: dict[str, float]) -> None:
        figures = {f"{prefix}/{name}": value for name, value in record.items() if name != "step"}
        left = self._progress.left_seconds
        self._status.tell(int(record["step"]), self._last_step, left, figures)

    def kept(self, checkpoints: Sequence[Path]) -> None:
        self._tracked.kept(checkpoints)

    def validation_of(self, step: int) -> Sequence[tracking.Point]:
        """The step's validation figures, as MLflow has them."""
        return self._tracked.curves.validation_of(step)


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
