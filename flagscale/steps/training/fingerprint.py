"""The name of a training: what its checkpoints are kept under.

Without torch, so that a launcher can tell which checkpoints its ranks have left.
"""

from __future__ import annotations

from collections.abc import Mapping

from flagscale.artifacts import Manifest, digest
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.recipe.decisive import decisive

_FORMAT = 2  # of the checkpoints: those of another begin a training of their own


def sections(
    distillation: DistillationRecipe, training: TrainingRecipe
) -> dict[str, dict[str, object]]:
    """The recipe's sections that a training depends on, as plain values."""
    return {
        "distillation": distillation.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
    }


def fingerprint(recipe: Mapping[str, dict[str, object]], parents: Mapping[str, Manifest]) -> str:
    """Name of the checkpoints that may be resumed from: same inputs, same recipe, same result.

    How often checkpoints are saved changes no result (unless the best of them becomes it), nor does
    the number of processes (but for rounding): a training may go on where it was on another layout.

    Args:
        recipe: `sections`.
        parents: manifests of `teacher`, `student` and `dataset`.
    """
    known = decisive(recipe)
    origin = {name: manifest.digest for name, manifest in parents.items()}
    return digest([_FORMAT, known["distillation"], known["training"], origin]).removeprefix(
        "sha256:"
    )[:16]
