"""Sets two finished runs of one recipe side by side: with its teacher, and without."""

import json
from pathlib import Path
from typing import Any

import yaml

from flagscale.errors import UserError
from flagscale.recipe import Recipe

_SAME = ("name", "teacher", "student", "data", "training", "evaluation")


def compare_with_baseline(recipe: Recipe, runs: Path) -> str:
    """Compare the newest distilled student with the newest one trained without a teacher.

    Args:
        recipe: both runs have its teacher, student, data, training and evaluation.
        runs: folder of all runs.

    Returns:
        Markdown tables with intervals; differences are paired by document.

    Raises:
        UserError: one of the runs is missing or unfinished, or they are not comparable.
    """
    from flagscale.evaluation.compare import compare

    distilled = _newest(recipe, runs, baseline=False)
    baseline = _newest(recipe, runs, baseline=True)
    return compare(distilled, baseline, ("Distilled", "Baseline")).markdown()


def _newest(recipe: Recipe, runs: Path, baseline: bool) -> Path:
    """The evaluation of the newest finished run that fits."""
    for summary in sorted(runs.glob("2*/summary.json"), reverse=True):
        if summary.parent.is_symlink():
            continue
        values = yaml.safe_load((summary.parent / "recipe.yaml").read_text(encoding="utf-8"))
        if values.get("sweep") or _shared(Recipe.model_validate(values)) != _shared(recipe):
            continue
        if (values["distillation"]["loss"] == "none") == baseline:
            steps = json.loads(summary.read_text(encoding="utf-8"))["steps"]
            return Path(steps["evaluate"]["outputs"]["evaluation"])
    loss = "none" if baseline else "logits"
    raise UserError(
        f"{runs}: no finished run of {recipe.name} with distillation.loss={loss}; make one with: "
        f"python -m pipelines run RECIPE --runs {runs} --set distillation.loss={loss}"
    )


def _shared(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json", include=set(_SAME))
    for section in ("teacher", "student", "data"):  # filled in by a run, not by the recipe's file
        del values[section]["fingerprint"]
    return values
