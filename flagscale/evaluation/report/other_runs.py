"""Other runs that a report is read beside: the baseline, other seeds, whatever was compared.

    python -m flagscale.evaluation.report EVALUATION --beside baseline=ANOTHER_EVALUATION

They were measured on the same documents, beside the same teacher: anything else is refused. What
each of them is follows from the recipes: a training without a teacher is a baseline, one that
differs in nothing but `training.seed` is another seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flagscale.artifacts import open_artifact
from flagscale.errors import UserError
from flagscale.evaluation.compare import check_same, read_evaluation
from flagscale.evaluation.figures import AFTER
from flagscale.evaluation.report.data import Other, ReportData


def with_others(data: ReportData, folder: Path, others: Mapping[str, Path]) -> ReportData:
    """Read other evaluations.

    Args:
        data: of an evaluation.
        folder: its artifact.
        others: name -> artifact of another.

    Raises:
        UserError: one is damaged, or cannot be compared.
    """
    own = _recipe(folder)
    found = []
    for name, other in others.items():
        metrics, fidelity = read_evaluation(other)
        check_same(folder, other, data.metrics, metrics, data.fidelity, fidelity)
        found.append(Other(name, _kind(own, _recipe(other)), fidelity.sums[AFTER]))
    return replace(data, others=(*data.others, *found))


def named_folders(arguments: list[str]) -> dict[str, Path]:
    """`NAME=FOLDER`, as they stand on a command line.

    Raises:
        UserError: one is written otherwise, or two have one name.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        name, sign, folder = argument.partition("=")
        if not (name and sign and folder):
            raise UserError(f"--beside {argument}: must be NAME=FOLDER, e.g. baseline={argument}")
        if name in found:
            raise UserError(f"--beside {argument}: there is another {name!r}")
        found[name] = Path(folder)
    return found


def _recipe(folder: Path) -> dict[str, Any]:
    facts = open_artifact(folder, "evaluation").facts
    recipe: dict[str, Any] = facts.get("measured", {}).get("recipe", {})
    return recipe


def _kind(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    losses = [recipe.get("distillation", {}).get("loss") for recipe in (own, other)]
    if losses[1] == "none" != losses[0]:
        return "baseline"
    seedless = [
        {**recipe, "training": {**recipe.get("training", {}), "seed": None}}
        for recipe in (own, other)
    ]
    return "seed" if own and seedless[0] == seedless[1] and own != other else "run"
