import json
from pathlib import Path

import pytest

from flagscale import tracking
from flagscale.errors import UserError
from flagscale.recipe import Recipe, load_recipe
from pipelines.local.comparison import _newest, compare_with_baseline

RECIPE = Recipe.model_validate(
    {
        "name": "r",
        "teacher": {"source": "t"},
        "student": {"num_layers": 2},
        "training": {"train_iters": 1, "lr": 1e-3},
    }
)
BASELINE = RECIPE.model_copy(
    update={"distillation": RECIPE.distillation.model_copy(update={"loss": "none"})}
)


def finished(runs: Path, stamp: str, recipe: Recipe) -> Path:
    """What a finished run leaves, its recipe with a fingerprint."""
    folder = runs / f"{stamp}-r"
    folder.mkdir(parents=True)
    teacher = recipe.teacher.model_copy(update={"fingerprint": stamp})
    text = tracking.recipe_yaml(recipe.model_copy(update={"teacher": teacher}))
    (folder / "recipe.yaml").write_text(text)
    steps = {"evaluate": {"outputs": {"evaluation": str(folder / "results")}}}
    (folder / "summary.json").write_text(json.dumps({"steps": steps}))
    return folder


def test_the_newest_runs_of_the_same_recipe_are_taken(tmp_path: Path) -> None:
    finished(tmp_path, "2026-01-01", RECIPE)
    wanted = finished(tmp_path, "2026-01-02", RECIPE)
    baseline = finished(tmp_path, "2026-01-03", BASELINE)
    longer = RECIPE.training.model_copy(update={"train_iters": 9})
    finished(tmp_path, "2026-01-04", RECIPE.model_copy(update={"training": longer}))
    vary = {"sweep": {"vary": {"training.seed": [1, 2]}}}
    sweep = Recipe.model_validate({**RECIPE.model_dump(mode="json"), **vary})
    finished(tmp_path, "2026-01-06", sweep)
    unfinished = finished(tmp_path, "2026-01-05", RECIPE)
    (unfinished / "summary.json").unlink()
    (tmp_path / "latest").symlink_to(wanted)
    for recipe in (RECIPE, BASELINE, load_recipe(baseline / "recipe.yaml")):
        found, evaluation = _newest(recipe, tmp_path, baseline=False)
        assert evaluation == wanted / "results"
        assert found.distillation == RECIPE.distillation
        assert _newest(recipe, tmp_path, baseline=True)[1] == baseline / "results"


def test_a_missing_run_comes_with_its_command(tmp_path: Path) -> None:
    finished(tmp_path, "2026-01-01", RECIPE)
    with pytest.raises(UserError, match=r"--set distillation\.loss=none"):
        compare_with_baseline(RECIPE, tmp_path)
