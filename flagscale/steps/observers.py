"""Who is told how training goes: the progress, MLflow and Kubeflow Trainer, or nobody."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flagscale import tracking
from flagscale.evaluation.forecast import CONFIDENCE, curve_of, decisive_loss
from flagscale.execution import launch
from flagscale.execution.trainjob.status import TrainJobStatus
from flagscale.train.checkpoints import TrainingState
from flagscale.train.loop import Observer
from flagscale.train.progress import Progress

logger = logging.getLogger(__name__)


@contextmanager
def observer(
    run: tracking.StepRun, state: TrainingState, last_step: int, rates: Sequence[float]
) -> Iterator[Observer]:
    """Who is told, while the body trains: on the first rank everybody, elsewhere nobody.

    Args:
        run: the step's run in MLflow.
        state: where training goes on.
        last_step: steps in all, of this attempt.
        rates: learning rate of each step of the whole training.
    """
    if not launch.is_first_rank():
        yield _Silence()
        return
    with Progress(state.step, last_step) as progress, TrainJobStatus() as status:
        yield _Observers(progress, status, last_step, run, state, rates)


class _Observers:
    """Passes records on to the progress, MLflow and Trainer, and says how training will end."""

    def __init__(
        self,
        progress: Progress,
        status: TrainJobStatus,
        last_step: int,
        run: tracking.StepRun,
        state: TrainingState,
        rates: Sequence[float],
    ) -> None:
        """Give MLflow the curve up to here first, so that a resumed run shows all of it."""
        self._progress, self._run = progress, run
        self._status, self._last_step = status, last_step
        self._state, self._rates = state, rates
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
        if 0 < record["step"] < len(self._rates):
            self._forecast()
        self._tell("validation", record)

    def _forecast(self) -> None:
        logs, end = (self._state.training, self._state.validation), len(self._rates)
        key = decisive_loss(logs[0])
        try:
            made = curve_of(*logs, self._rates, key).forecast(end, CONFIDENCE)
        except ValueError as error:  # too little, or losses that no curve is fitted to
            logger.info("no forecast of the loss after step %d: %s", end, error)
            return
        told = (end, key, made.value, made.low, made.high, 100 * CONFIDENCE)
        logger.info("forecast of step %d: validation's %s %.4f (%.4f to %.4f, %.0f%%)", *told)

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
