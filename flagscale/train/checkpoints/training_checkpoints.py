"""The checkpoints of one training run: saved, kept, resumed from."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from flagscale.checkpoint.agreement import is_first_rank, on_first_rank
from flagscale.checkpoint.writing import execute, prepare_save, schedule
from flagscale.errors import UserError
from flagscale.train.checkpoints.cost import SaveCost
from flagscale.train.checkpoints.folders import STATE, CheckpointFolders
from flagscale.train.checkpoints.mirror import Mirror
from flagscale.train.checkpoints.training_state import (
    TrainingState,
    layout,
    load_best_weights,
    load_state,
    sharded_state,
)

if TYPE_CHECKING:
    from flagscale.train.trainer import Trainer

logger = logging.getLogger(__name__)

_READING, _WRITING = "cannot be read", "could not be written"


class TrainingCheckpoints:
    """The checkpoints of one training run, in one folder. All ranks call every method.

    Attributes:
        kept: on the first rank those that are there since the last one was written.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        async_save: bool = False,
        best_by: str = "lm loss",
        mirror: Mirror | None = None,
        may_be_best: Callable[[int], bool] = lambda step: True,
    ) -> None:
        """Use `folder`, which need not exist yet.

        Args:
            folder: where all ranks write.
            keep: how many of the newest stay, beside the best.
            async_save: write while training goes on, one checkpoint at a time.
            best_by: name of the validation loss that the best checkpoint is smallest in.
            mirror: keeps the folder in an object store; every rank has one, or none has.
            may_be_best: whether the checkpoint of a step can be the best.
        """
        self.folder = folder
        self._mirror = mirror
        self._folders = CheckpointFolders(folder, keep, best_by, may_be_best)
        self._async_save = async_save
        self._calls = AsyncCallsQueue(persistent=False)
        self._partial: Path | None = None
        self._cost: SaveCost | None = None
        self._published: Path | None = None  # on the first rank, until its cost is told
        self.kept: list[Path] = []

    def save(self, state: TrainingState, trainer: Trainer) -> None:
        """Write a checkpoint; when it is complete, make it the latest and delete old ones.

        One that is still being written is waited for. A step that is the latest already is not
        written again.

        Raises:
            UserError: a rank cannot write, e.g. because the disk is full; the checkpoint before is
                untouched.
        """
        self._finish(blocking=True)
        self._cost = SaveCost(state.step)
        with self._cost.waiting():
            self._write(state, trainer)
        self._tell_cost()

    def _write(self, state: TrainingState, trainer: Trainer) -> None:
        history = {**asdict(state), "layout": layout()}
        partial = on_first_rank(self.folder, _WRITING, lambda: self._begin(history))
        if partial is None:
            return
        self._partial = partial
        with self._dropped_on_failure():
            request = prepare_save(
                sharded_state(trainer), partial / STATE, in_background=self._async_save
            )
            request.add_finalize_fn(self._publish)
            if self._async_save:
                schedule(request, self.folder, self._calls)
            else:
                execute(request, self.folder)

    def poll(self) -> None:
        """Complete the checkpoint that is being written, if all ranks are done with it.

        Raises:
            UserError: a rank could not write it.
        """
        self._finish(blocking=False)

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete, and in the object store.

        Raises:
            UserError: a rank could not write it. That it could not be uploaded is only told.
        """
        self._finish(blocking=True)
        # In turns of seconds: other ranks' patience with a collective has an end.
        while self._mirror and not on_first_rank(self.folder, _WRITING, self._mirror.uploaded):
            pass

    def restore(self, trainer: Trainer, at_most: int | None = None) -> TrainingState:
        """Load the latest checkpoint, if there is one, and say where training stands.

        Args:
            trainer: filled in.
            at_most: take none of a later step than this.

        Raises:
            UserError: the latest checkpoint cannot be read.
        """
        while self._mirror and not on_first_rank(self.folder, _READING, self._mirror.downloaded):
            pass
        latest = on_first_rank(self.folder, _READING, lambda: self._folders.latest(at_most))
        if latest is None:
            return TrainingState()
        load_state(trainer, latest.path / STATE, latest.layout)
        return TrainingState(latest.step, latest.training, latest.validation)

    def restore_best(self, trainer: Trainer) -> int:
        """Load the weights of the checkpoint with the smallest validation loss, and those alone.

        Returns:
            Its step.

        Raises:
            UserError: no checkpoint was validated, or the best cannot be read.
        """
        best = on_first_rank(self.folder, _READING, self._folders.best)
        if best is None:
            raise UserError(f"{self.folder}: no checkpoint of a step that was validated")
        load_best_weights(trainer, best.path / STATE)
        return best.step

    def _begin(self, history: dict[str, object]) -> Path | None:
        latest = self._folders.latest()
        if latest is not None and latest.step == history["step"]:
            return None
        return self._folders.begin(history)

    def _publish(self) -> None:
        partial = self._partial
        assert partial is not None
        on_first_rank(self.folder, _WRITING, lambda: self._make_latest(partial))
        self._partial = None

    def _make_latest(self, partial: Path) -> None:
        self.kept = self._folders.publish(partial)
        self._published = self.kept[-1]
        if self._mirror is not None:
            self._mirror.upload(self.kept)

    def _finish(self, blocking: bool) -> None:
        if self._cost is not None and self._calls.get_num_unfinalized_calls():
            with self._cost.waiting(), self._dropped_on_failure():
                self._calls.maybe_finalize_async_calls(blocking=blocking)
            self._tell_cost()

    def _tell_cost(self) -> None:
        if self._cost is not None and self._published is not None:
            self._cost.tell(self._published)
            self._published = None

    @contextmanager
    def _dropped_on_failure(self) -> Iterator[None]:
        """What could not be written whole only takes space."""
        try:
            yield
        except BaseException:
            if self._partial is not None and is_first_rank():
                shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None
            raise
