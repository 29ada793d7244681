"""Which of the teacher's layers can go, as measured: by the student's own step, or once for all.

    layer_importance.json       of an artifact of kind `layer-importance`: a list, see `Measurement`

Layers go one by one, in an order that does not depend on how many go: what was measured for more
serves those where fewer go.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from flagscale.artifacts import open_artifact, read_manifest
from flagscale.data.calibration import Calibration
from flagscale.errors import UserError
from flagscale.evaluation.measure.layer_importance import (
    LayerImportance,
    Measured,
    Removal,
    measure_importance,
)
from flagscale.execution.launch import is_first_rank
from flagscale.execution.step_process import when_published
from flagscale.megatron.arguments import Arguments
from flagscale.recipe import StudentRecipe
from flagscale.shared.notes import Note

logger = logging.getLogger(__name__)

KIND = "layer-importance"
FILE = "layer_importance.json"


@dataclass(frozen=True)
class Measurement:
    """One measurement.

    Attributes:
        importance: what was found.
        digest: of the text that it was measured on.
    """

    importance: LayerImportance
    digest: str

    def values(self) -> dict[str, Any]:
        """As JSON; `of` reads it back."""
        found = self.importance
        return {
            "criterion": found.criterion,
            "calibration_tokens": found.tokens,
            "calibration_digest": self.digest,
            "scores": list(found.scores),
            "removals": [asdict(removal) for removal in found.removals],
            "kept": list(found.kept),
        }

    @classmethod
    def of(cls, values: dict[str, Any]) -> Measurement:
        """See `values`."""
        removals = tuple(Removal(**one) for one in values["removals"])
        scores = tuple(values["scores"])
        tokens = values["calibration_tokens"]
        found = LayerImportance(values["criterion"], scores, removals, tokens)
        return cls(found, values["calibration_digest"])


def asked_by(student: StudentRecipe) -> dict[str, Any]:
    """What decides on a measurement, beside teacher and dataset, but for how many layers go."""
    return {
        "layer_importance": student.layer_importance,
        "tokens": student.measured_tokens,
        "seed": student.seed,
    }


def measure(
    student: StudentRecipe,
    teacher: Path,
    args: Arguments,
    model: GPTModel,
    text: Calibration,
    gone: int,
) -> Measurement:
    """Measure, going on with what a step that was killed has noted. All ranks call it.

    Args:
        student: the recipe's section.
        teacher: the artifact.
        args: that the model was built with.
        model: the teacher.
        text: to measure on.
        gone: how many layers go.
    """
    about = {
        "criterion": student.layer_importance,
        "teacher": read_manifest(teacher).digest,
        "text": text.digest,
        "dtype": str(args.params_dtype),
        "layout": args.parallelism.model_dump(mode="json"),
    }
    note = Note("layer-importance", about)
    told: list[Measured] = [note.read() if is_first_rank() else {}]
    torch.distributed.broadcast_object_list(told, src=0)
    if told[0]:
        logger.info("going on after %d models that were measured before", len(told[0]))
    tell = note.write if is_first_rank() else lambda known: None
    criterion = student.layer_importance
    logger.info("measuring which %d of the layers can go, %d tokens", gone, text.tokens)
    found = measure_importance(model, text.batches, criterion, gone, told[0], tell)
    if is_first_rank():
        when_published(note.remove)
    return Measurement(found, text.digest)


def as_file(measured: Iterable[tuple[StudentRecipe, Measurement]]) -> list[dict[str, Any]]:
    """The content of `FILE`: measurements, each beside what asked for it."""
    return [{"asked": asked_by(student), **found.values()} for student, found in measured]


def measured_before(
    student: StudentRecipe, folder: Path | None, teacher: Path, dataset: Path, gone: int
) -> Measurement | None:
    """What measure-layers has found for a student; None where it was not asked, or failed.

    Args:
        student: the recipe's section.
        folder: of the `layer-importance` artifact, or of one that says that there is none.
        teacher: the artifact that the student is cut from.
        dataset: the artifact that is measured on.
        gone: how many layers go.

    Raises:
        UserError: the artifact is damaged, or of another teacher or dataset.
    """
    if folder is None or read_manifest(folder).kind != KIND:
        return None
    manifest = open_artifact(folder, KIND)
    for name, path in (("teacher", teacher), ("dataset", dataset)):
        own, other = read_manifest(path).digest, manifest.parents[name]
        if own != other:
            raise UserError(
                f"{folder}: the layers of another {name} were measured ({other}), this student's "
                f"is {own}; run measure-layers with it"
            )
    for values in json.loads((folder / FILE).read_text(encoding="utf-8")):
        if values["asked"] == asked_by(student) and len(values["removals"]) >= gone:
            found = Measurement.of(values)
            fewer = replace(found.importance, removals=found.importance.removals[:gone])
            return Measurement(fewer, found.digest)
    return None
