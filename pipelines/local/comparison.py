"""Sets two finished runs of one recipe side by side: with its teacher, and without."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from flagscale.errors import UserError
from flagscale.recipe import Recipe

_SAME = ("name", "teacher", "student", "data", "training", "evaluation")


_REPORT = "baseline-report.html"


def compare_with_baseline(recipe: Recipe, runs: Path) -> str:
    """Compare the newest distilled student with the newest one trained without a teacher.

    The report of the former is written again, into `runs`, with the latter in it, and with the
    newest run of each other seed.

    Args:
        recipe: of either; both have its teacher, student, data, training and evaluation.
        runs: folder of all runs.

    Returns:
        Markdown tables with intervals; differences are paired by document. Where the report is.

    Raises:
        UserError: one of the runs is missing or unfinished, or they are not comparable.
    """
    from flagscale.evaluation.compare import compare
    from flagscale.evaluation.report.data import ReportData
    from flagscale.evaluation.report.other_runs import with_others
    from flagscale.evaluation.report.page import render

    taught, distilled = _newest(recipe, runs, baseline=False)
    _, baseline = _newest(recipe, runs, baseline=True)
    tables = compare(distilled, baseline, ("Distilled", "Baseline")).markdown()
    others = {"Baseline": baseline, **_seeds(taught, runs)}
    report = runs / _REPORT
    data = with_others(ReportData.load(distilled), distilled, others)
    report.write_text(render(data), encoding="utf-8")
    return f"{tables}\nReport with both: {report}\n"


def _newest(recipe: Recipe, runs: Path, baseline: bool) -> tuple[Recipe, Path]:
    """Recipe and evaluation of the newest finished run that fits."""
    for found, evaluation in _finished(runs):
        if _shared(found) == _shared(recipe) and _is_baseline(found) == baseline:
            return found, evaluation
    loss = "none" if baseline else "logits"
    raise UserError(
        f"{runs}: no finished run of {recipe.name} with distillation.loss={loss}; make one with: "
        f"python -m pipelines run RECIPE --runs {runs} --set distillation.loss={loss}"
    )


def _seeds(recipe: Recipe, runs: Path) -> dict[str, Path]:
    """Of each other seed of the same distillation the newest evaluation."""
    seeds: dict[str, Path] = {}
    for found, evaluation in _finished(runs):
        seed = found.training.seed
        of_this_seed = found.training.model_copy(update={"seed": recipe.training.seed})
        alike = _shared(found.model_copy(update={"training": of_this_seed})) == _shared(recipe)
        if alike and seed != recipe.training.seed and found.distillation == recipe.distillation:
            seeds.setdefault(f"Seed {seed}", evaluation)
    return seeds


def _finished(runs: Path) -> Iterator[tuple[Recipe, Path]]:
    """Recipe and evaluation of each finished run of one student, the newest first."""
    for summary in sorted(runs.glob("2*/summary.json"), reverse=True):
        if summary.parent.is_symlink():
            continue
        values = yaml.safe_load((summary.parent / "recipe.yaml").read_text(encoding="utf-8"))
        steps = json.loads(summary.read_text(encoding="utf-8"))["steps"]
        if not values.get("sweep") and "evaluate" in steps:
            yield (
                Recipe.model_validate(values),
                Path(steps["evaluate"]["outputs"]["evaluation"]),
            )


def _is_baseline(recipe: Recipe) -> bool:
    return recipe.distillation.loss == "none"


def _shared(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json", include=set(_SAME))
    for section in ("teacher", "student", "data"):  # filled in by a run, not by the recipe's file
        del values[section]["fingerprint"]
    return values
