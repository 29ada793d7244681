"""The folders of one training's checkpoints: which is the latest, which the best, which go.

    latest.json         which checkpoint to resume from
    best.json           which kept checkpoint had the smallest validation loss
    step-00000050/      a complete checkpoint: state/ (tensors) and history.json
    .step-...           one that is being written, or deleted

A folder gets its name by a rename, after everything in it is on the disk, and loses it by a rename
before anything is deleted: `step-...` is always whole. Both pointers follow from the folders and
can be lost. One process (the first rank) uses this.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale.artifacts import flush, write_json
from flagscale.errors import UserError

logger = logging.getLogger(__name__)

STATE = "state"
_HISTORY = "history.json"
_LATEST = "latest.json"
_BEST = "best.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: its folder.
        step: optimiser steps done.
        layout: sizes of the process groups that wrote it.
        training: one record a step.
        validation: one record a validation.
    """

    path: Path
    step: int
    layout: dict[str, int]
    training: list[dict[str, float]]
    validation: list[dict[str, float]]

    def loss(self, name: str) -> float:
        """Its validation loss (nats a token); infinite if it was not validated at its step."""
        found = [record for record in self.validation if record["step"] == self.step]
        loss = found[-1].get(name, math.inf) if found else math.inf
        return loss if math.isfinite(loss) else math.inf


class CheckpointFolders:
    """The folders below one folder."""

    def __init__(
        self,
        root: Path,
        keep: int,
        best_by: str,
        may_be_best: Callable[[int], bool] = lambda step: True,
    ) -> None:
        """Use `root`, which need not exist yet.

        Args:
            root: of all checkpoints of one training.
            keep: how many of the newest stay, beside the best.
            best_by: name of the validation loss that the best is smallest in.
            may_be_best: whether a step counts; not one that was saved because of a clock or a
                signal, or the best would depend on them.
        """
        self.root, self._keep, self._best_by = root, keep, best_by
        self._may_be_best = may_be_best

    def begin(self, history: dict[str, Any]) -> Path:
        """A new folder for a checkpoint, under a name that no other process knows.

        A writer that was left behind may still write into a folder of the same step.

        Args:
            history: fields of `Checkpoint`, but `path`.
        """
        for stale in self.root.glob(".step-*"):
            shutil.rmtree(stale, ignore_errors=True)
        path = self.root / f".{_name(history['step'])}.partial-{uuid.uuid4().hex[:8]}"
        path.mkdir(parents=True)
        write_json(path / _HISTORY, history)
        return path

    def publish(self, partial: Path) -> list[Path]:
        """Make a folder from `begin`, now complete, the latest checkpoint, and delete old ones.

        Returns:
            The checkpoints that are kept, the latest last.
        """
        checkpoint = _read(partial)
        flush(partial)
        path = self.root / _name(checkpoint.step)
        if path.exists():  # written by a training that was killed before it became the latest
            self._delete(path)
        os.replace(partial, path)
        flush(self.root, deep=False)
        write_json(self.root / _LATEST, {"step": checkpoint.step, "folder": path.name})
        # Later ones are left of a training that was set back to an earlier checkpoint.
        kept = [one for one in self._complete() if one.step <= checkpoint.step]
        best = self._best(kept)
        self._point_to_best(best)
        stay = [one for one in kept if one in kept[-self._keep :] or one == best]
        for old in kept:
            if old not in stay:
                self._delete(old.path)
        return [one.path for one in stay]

    def latest(self, at_most: int | None = None) -> Checkpoint | None:
        """The checkpoint to resume from, None if there is none.

        Args:
            at_most: of no later step, where an earlier end of the training is asked for.

        Raises:
            UserError: its history cannot be read.
        """
        path = self._pointed_to()
        found = None if path is None else _read(path)
        complete = [] if found else self._complete()
        if complete:
            logger.warning("%s names no checkpoint: taking the newest", self.root / _LATEST)
            found = complete[-1]
        if found is None or at_most is None or found.step <= at_most:
            return found
        earlier = [one for one in self._complete() if one.step <= at_most]
        return earlier[-1] if earlier else None

    def best(self) -> Checkpoint | None:
        """Of those that count, the one with the smallest validation loss; None if none has one."""
        latest = self.latest()
        upto = -1 if latest is None else latest.step
        return self._best([one for one in self._complete() if one.step <= upto])

    def _best(self, checkpoints: list[Checkpoint]) -> Checkpoint | None:
        validated = [
            one
            for one in checkpoints
            if self._may_be_best(one.step) and one.loss(self._best_by) < math.inf
        ]
        return min(validated, key=lambda one: (one.loss(self._best_by), -one.step), default=None)

    def _point_to_best(self, best: Checkpoint | None) -> None:
        if best is None:
            (self.root / _BEST).unlink(missing_ok=True)
            return
        loss = {self._best_by: best.loss(self._best_by)}
        write_json(self.root / _BEST, {"step": best.step, "folder": best.path.name, **loss})

    def _pointed_to(self) -> Path | None:
        try:
            pointer = json.loads((self.root / _LATEST).read_text(encoding="utf-8"))
            path = self.root / pointer["folder"]
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None
        return path if _is_complete(path) else None

    def _complete(self) -> list[Checkpoint]:
        """From the oldest to the newest."""
        return [_read(path) for path in sorted(self.root.glob("step-*")) if _is_complete(path)]

    def _delete(self, path: Path) -> None:
        doomed = path.with_name(f".{path.name}.deleted-{uuid.uuid4().hex[:8]}")
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _is_complete(path: Path) -> bool:
    return (path / _HISTORY).is_file() and (path / STATE / "metadata.json").is_file()


def _read(path: Path) -> Checkpoint:
    try:
        history = json.loads((path / _HISTORY).read_text(encoding="utf-8"))
        return Checkpoint(path=path, **history)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path / _HISTORY}: cannot be read: {error}; delete {path} to go on without it"
        ) from error
