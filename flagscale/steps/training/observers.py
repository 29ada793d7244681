"""Who is told how training goes: the progress, MLflow and Kubeflow Trainer, or nobody."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core import parallel_state

from flagscale import tracking
from flagscale.evaluation.forecast.accounts import CONFIDENCE, curve_of, decisive_loss
from flagscale.evaluation.forecast.learning_rates import learning_rates
from flagscale.execution import launch
from flagscale.execution.trainjob.status import TrainJobStatus
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments
from flagscale.recipe import TrainingRecipe
from flagscale.train.checkpoints import TrainingState
from flagscale.train.progress import Progress
from flagscale.train.trainer import Trainer

logger = logging.getLogger(__name__)


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
    told = tracking.TrackedTraining(run, training, validation)
    told.begin(state.step, state.training, state.validation)
    with Progress(state.step, last_step) as progress, TrainJobStatus() as status:
        yield _Observers(progress, status, last_step, told, state, learning_rates(training))


class _Observers:
    """Passes records on to the progress, MLflow and Trainer, and says how training will end."""

    def __init__(
        self,
        progress: Progress,
        status: TrainJobStatus,
        last_step: int,
        tracked: tracking.TrackedTraining,
        state: TrainingState,
        rates: Sequence[float],
    ) -> None:
        self._progress, self._tracked = progress, tracked
        self._status, self._last_step = status, last_step
        self._state, self._rates = state, rates

    def trained(self, record: dict[str, float]) -> None:
        self._progress.trained(record)
        self._tracked.trained(record)
        self._tell("train", record)

    def validated(self, record: dict[str, float]) -> None:
        self._progress.validated(record)
        self._tracked.validated(record)
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

    def kept(self, checkpoints: Sequence[Path]) -> None:
        self._tracked.kept(checkpoints)

    def validation_of(self, step: int) -> Sequence[tracking.Point]:
        """The step's validation figures, as MLflow has them."""
        return self._tracked.validation_of(step)


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


def tell_begin(trainer: Trainer, args: Arguments) -> None:
    """What is trained, and how its ranks share it.

    Told once a request to stop is heard after a step, and no longer at once.
    """
    logger.info(
        "training %.1fM parameters in %s on %s",
        sum(p.numel() for chunk in trainer.chunks for p in chunk.parameters() if p.requires_grad)
        / 1e6,
        str(args.params_dtype).removeprefix("torch."),
        _layout_text(args),
    )


def _layout_text(args: Arguments) -> str:
    world_size = torch.distributed.get_world_size()
    if world_size == 1:
        return str(platform.device())
    sizes = args.parallelism
    names = {
        "tensor": sizes.tensor_model_parallel_size,
        "pipeline": sizes.pipeline_model_parallel_size,
        "context": sizes.context_parallel_size,
        "expert": sizes.expert_model_parallel_size,
        "data": parallel_state.get_data_parallel_world_size(),
    }
    split = " x ".join(f"{name} {size}" for name, size in names.items() if size > 1)
    return f"this rank of {world_size} {platform.device().type} processes ({split})"
