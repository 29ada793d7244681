"""Who is told how training goes: the progress, MLflow and Kubeflow Trainer, or nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flagscale import tracking
from flagscale.execution import launch
from flagscale.execution.trainjob.status import TrainJobStatus
from flagscale.train.checkpoints import TrainingState
from flagscale.train.loop import Observer
from flagscale.train.progress import Progress


@contextmanager
def observer(run: tracking.StepRun, state: TrainingState, last_step: int) -> Iterator[Observer]:
    """Who is told, while the body trains: on the first rank everybody, elsewhere nobody.

    Args:
        run: the step's run in MLflow.
        state: where training goes on.
        last_step: steps in all.
    """
    if not launch.is_first_rank():
        yield _Silence()
        return
    with Progress(state.step, last_step) as progress, TrainJobStatus() as status:
        yield _Observers(progress, status, last_step, run, state)


class _Observers:
    """Passes every record on to the progress, to MLflow and to Trainer."""

    def __init__(
        self,
        progress: Progress,
        status: TrainJobStatus,
        last_step: int,
        run: tracking.StepRun,
        state: TrainingState,
    ) -> None:
        """Give MLflow the curve up to here first, so that a resumed run shows all of it."""
        self._progress, self._run = progress, run
        self._status, self._last_step = status, last_step
        if state.step:
            run.mark_resumed()
        for record in state.training:
            self._log("train", record)
        for record in state.validation:
            self._log("validation", record)

    def trained(self, record: dict[str, float]) -> None:
        self._progress.trained(record)
        self._log("train", record)
        self._tell("train", record)

    def validated(self, record: dict[str, float]) -> None:
        self._progress.validated(record)
        self._log("validation", record)
        self._tell("validation", record)

    def _tell(self, prefix: str, record: dict[str, float]) -> None:
        figures = {f"{prefix}/{name}": value for name, value in record.items() if name != "step"}
        left = self._progress.left_seconds
        self._status.tell(int(record["step"]), self._last_step, left, figures)

    def _log(self, prefix: str, record: dict[str, float]) -> None:
        metrics = {f"{prefix}/{name}": value for name, value in record.items() if name != "step"}
        self._run.log_metrics(metrics, step=int(record["step"]))


class _Silence:
    """The observer of ranks that do not speak."""

    def trained(self, record: dict[str, float]) -> None:
        pass

    def validated(self, record: dict[str, float]) -> None:
        pass
