"""`plan --after RUN`: which training of a run a forecast is of, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flagscale.artifacts import new_artifact, write_json
from flagscale.errors import UserError
from flagscale.evaluation.forecast.learning_rates import learning_rates
from flagscale.recipe import Recipe, load_recipe
from flagscale.steps.search.rung import SAMPLE_LOSSES
from pipelines.__main__ import main
from pipelines.forecast import find, forecasts, stretched

RECIPE = Path("recipes/smollm2-135m-to-22-layers.yaml")
KD, LM = "logits distillation loss", "lm loss"


def write_run(folder: Path, recipe: Recipe, steps: int = 60, worse: float = 0.0) -> Path:
    """As `run` leaves it, of made-up losses; a training that goes on is several artifacts."""
    folder.mkdir(parents=True, exist_ok=True)
    values = recipe.model_dump(mode="json")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    number = len([*folder.glob("distilled_student*")]) + 1
    with new_artifact(folder / f"student-{number}", "student", {"student": values["student"]}) as s:
        (s.path / "weights").write_text("")
    student = s.manifest
    kind = "distilled-student" if steps == recipe.training.train_iters else "candidate"
    sections = {name: values[name] for name in ("distillation", "training")}
    output = folder / f"distilled_student-{number}"
    with new_artifact(output, kind, sections, {"student": student}) as staging:
        write_logs(staging.path, recipe, steps, worse)
        if kind == "candidate":
            loss = 0.9 * (1 + steps / 5) ** -0.2
            write_json(staging.path / SAMPLE_LOSSES, {KD: {"3": [64 * loss, 64.0]}})
    return folder


def write_logs(folder: Path, recipe: Recipe, steps: int, worse: float) -> None:
    teaches = recipe.distillation.loss != "none"

    def row(step: float) -> dict[str, float]:
        loss = 0.8 * (1 + step / 5) ** -0.2
        return ({KD: loss} if teaches else {}) | {LM: 2 + loss + worse}

    rates = learning_rates(recipe.training)
    training = [
        {"step": s, "learning rate": rates[s - 1]} | row(s - 1) for s in range(1, steps + 1)
    ]
    validation = [{"step": s} | row(s) for s in range(0, steps + 1, 15)]
    for name, rows in (("training", training), ("validation", validation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))


def change(recipe: Recipe, section: str, **values: Any) -> Recipe:
    own = getattr(recipe, section).model_copy(update=values)
    return recipe.model_copy(update={section: own})


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(RECIPE)


def test_the_losses_of_other_lengths(recipe: Recipe, tmp_path: Path) -> None:
    rows = forecasts(recipe, write_run(tmp_path / "run", recipe))
    assert [row.losses[KD].step for row in rows] == [30, 60, 120, 240]
    assert [row.tokens for row in rows] == [256 * step for step in (30, 60, 120, 240)]
    values = [row.losses[KD].value for row in rows]
    assert values == sorted(values, reverse=True)
    own = rows[1].losses[KD]
    assert own.low < 0.8 * 13**-0.2 < own.high
    wide = [row.losses[KD].high / row.losses[KD].low for row in rows[1:]]
    assert wide == sorted(wide)


def test_a_baseline_says_for_how_long_the_teacher_is_worth_it(
    recipe: Recipe, tmp_path: Path
) -> None:
    alone = change(recipe, "distillation", loss="none")
    for worse, likely in ((0.3, 0.95), (-0.3, 0.05)):
        baseline = write_run(tmp_path / f"alone {worse}", alone, worse=worse)
        run = write_run(tmp_path / f"run {worse}", recipe)
        ahead = forecasts(recipe, run, baseline)[1].ahead
        assert ahead is not None
        assert (ahead["chance"] > likely) if worse > 0 else (ahead["chance"] < likely)
        assert ahead["low"] < worse < ahead["high"]


def test_the_rungs_of_a_search_are_one_training(recipe: Recipe, tmp_path: Path) -> None:
    for steps in (15, 30):
        run = write_run(tmp_path / "run", recipe, steps)
    write_run(run, change(recipe, "student", num_layers=20), 45)
    found = find(recipe, run)
    assert found.steps == 30
    assert sorted(found.samples[KD]) == [15, 30]
    assert find(change(recipe, "student", num_layers=20), run).steps == 45


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("training", {"lr": 3e-4}, "training.lr=0.0003, but"),
        ("training", {"global_batch_size": 8}, "training.global_batch_size=8, but"),
        ("distillation", {"temperature": 2.0}, "distillation.temperature=2.0, but"),
        ("data", {"seq_length": 512}, "data.seq_length=512, but"),
        ("teacher", {"source": "x/y"}, "teacher.source=x/y, but"),
        ("student", {"num_layers": 21}, "no training of the recipe's student"),
    ],
)
def test_another_training_is_refused_by_name(
    recipe: Recipe, tmp_path: Path, section: str, values: dict[str, Any], told: str
) -> None:
    run = write_run(tmp_path / "run", recipe)
    with pytest.raises(UserError, match=told):
        forecasts(change(recipe, section, **values), run)


def test_what_decides_on_no_loss_may_differ(recipe: Recipe, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", recipe)
    other = change(recipe, "training", train_iters=600, lr_decay_style="linear", seed=2,
                   save_interval=7)  # fmt: skip
    assert forecasts(other, run)[1].losses[KD].step == 600


def test_a_folder_that_is_no_run_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no recipe\.yaml"):
        forecasts(recipe, tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.read_text())
    with pytest.raises(UserError, match="no training of the recipe's student was begun there"):
        forecasts(recipe, tmp_path)


def test_a_stretched_training_keeps_its_proportions(recipe: Recipe) -> None:
    training = change(recipe, "training", lr_decay_style="WSD", lr_wsd_decay_iters=20).training
    twice = stretched(training, 2)
    assert (twice.train_iters, twice.lr_warmup_iters, twice.lr_wsd_decay_iters) == (120, 6, 40)
    assert stretched(training, 1) == training


def test_the_command(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", recipe)
    assert main(["plan", str(RECIPE), "--after", str(run)]) == 0
    told = capsys.readouterr().out
    assert f"forecast from the 60 steps of {run}" in told
    assert "by the law of arXiv 2502.08606 text alone gives the better student from" in told
    assert main(["plan", str(RECIPE), "--after", str(run), "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert [row["losses"][KD]["step"] for row in plan["forecast"]] == [30, 60, 120, 240]
    assert main(["plan", str(RECIPE), "--baseline", str(run)]) == 2
    assert "--baseline is compared with --after, which is missing" in capsys.readouterr().err
