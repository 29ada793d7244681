"""export-winner: the student that leads a sweep's leaderboard -> an `export` artifact."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from flagscale.artifacts import open_artifact
from flagscale.errors import UserError
from flagscale.execution.absent import absent
from flagscale.recipe import ExportRecipe, ModelsRecipe
from flagscale.steps.export_student import export_student

logger = logging.getLogger(__name__)

_KINDS = {"distilled": "distilled-student", "evaluation": "evaluation"}


def export_winner(
    export: ExportRecipe,
    students: Sequence[Path],
    evaluations: Sequence[Path],
    leaderboard: Path,
    output: Path,
    winners_evaluation: Path,
    models: ModelsRecipe = ModelsRecipe(),
    lineage: Path | None = None,
) -> dict[str, float]:
    """Export the student that leads the leaderboard; see `export_student`.

    Args:
        export: the recipe's section.
        students: the `distilled-student` artifacts of the sweep, in any order.
        evaluations: their `evaluation` artifacts, in any order.
        leaderboard: the `leaderboard` artifact of the sweep.
        output: folder of the `export` artifact.
        winners_evaluation: where the winner's `evaluation` artifact is copied to, for later steps.
        models: how the step is spread over processes.
        lineage: see `export_student`.

    Returns:
        The figures of `export_student`.

    Raises:
        UserError: the winner is not among the artifacts, or cannot be exported.
    """
    facts = open_artifact(leaderboard, "leaderboard").facts
    logger.info("exporting the winner, %s", facts["winner"])
    distilled, evaluation = (
        _find(paths, name, facts["digests"][name])
        for name, paths in (("distilled", students), ("evaluation", evaluations))
    )
    figures = export_student(export, distilled, evaluation, output, models, lineage)
    shutil.copytree(evaluation, winners_evaluation, dirs_exist_ok=True)
    return figures


def _find(paths: Sequence[Path], name: str, wanted: str) -> Path:
    """The artifact with this digest; only the winner's files will be hashed, when it is opened."""
    for path in paths:
        if (
            absent(path) is None
            and open_artifact(path, _KINDS[name], check_files=False).digest == wanted
        ):
            return path
    raise UserError(
        f"none of {len(paths)} {_KINDS[name]} artifacts is the leaderboard's winner ({wanted}); "
        "give the artifacts of one sweep"
    )
