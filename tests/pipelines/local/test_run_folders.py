"""Folders of runs and of their trainings: what they are called, and who may have them."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sourced_recipe import recipe

from flagscale.errors import UserError
from flagscale.execution.exclusive import exclusively
from flagscale.recipe import ParallelismRecipe, Recipe
from pipelines.local.preflight import with_fingerprints
from pipelines.local.runner import _forget, checkpoint_folder, run_recipe


def test_checkpoints_belong_to_a_training(tmp_path: Path) -> None:
    one = recipe("t", num_layers=2)
    same = one.model_copy(
        update={"evaluation": one.evaluation.model_copy(update={"max_documents": 3})}
    )
    other = one.model_copy(update={"training": one.training.model_copy(update={"seed": 1})})
    vary = {"sweep": {"vary": {"training.seed": [1, 2]}}}
    sweep = Recipe.model_validate({**one.model_dump(mode="json"), **vary})
    assert checkpoint_folder(sweep, tmp_path) != checkpoint_folder(one, tmp_path)
    layout = ParallelismRecipe(tensor_model_parallel_size=2)
    spread = one.model_copy(
        update={"training": one.training.model_copy(update={"parallelism": layout})}
    )
    folders = [checkpoint_folder(r, tmp_path) for r in (one, same, spread, other)]
    assert folders[0] == folders[1] == folders[2] != folders[3]


def test_where_the_best_checkpoint_is_kept_the_save_interval_is_part_of_the_name(
    tmp_path: Path,
) -> None:
    def folder(**changes: object) -> Path:
        values = recipe("t").model_dump(mode="json")
        values["training"] |= {"eval_interval": 5, **changes}
        return checkpoint_folder(Recipe.model_validate(values), tmp_path)

    last, best = {"keep_weights": "last"}, {"keep_weights": "best"}
    assert folder(**last, save_interval=5) == folder(**last, save_interval=10)
    assert folder(**best, save_interval=5) != folder(**best, save_interval=10)
    assert folder(**best, save_interval=5) == folder(**best, save_interval=5, async_save=True)


@pytest.mark.parametrize("name", ["/proc/x", "/proc", "file", "file/x"])
def test_a_place_that_is_no_folder_for_runs(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    runs = tmp_path / name
    with pytest.raises(UserError, match=rf"^--runs {runs}: .*; name a folder"):
        run_recipe(recipe("t"), runs)


HOLD = """
import sys, time
from pathlib import Path
from flagscale.execution.exclusive import exclusively
with exclusively(sys.argv[1]):
    Path(sys.argv[1]).mkdir()
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is at the training `held`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "trainings" / "held")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_checkpoints_of_another_runs_training_stay(
    tmp_path: Path, other_run: subprocess.Popen[str]
) -> None:
    checkpoints = tmp_path / "trainings"
    (checkpoints / "interrupted").mkdir()
    (checkpoints / "ended.lock").touch()
    assert _forget(checkpoints) == [checkpoints / "held"]
    assert {path.name for path in checkpoints.iterdir()} == {"held", "held.lock"}
    with pytest.raises(UserError), exclusively(str(checkpoints / "held"), patience_seconds=0.0):
        pytest.fail("the lock keeps nobody out any more")
    other_run.kill()
    other_run.wait()
    assert _forget(checkpoints) == []
    assert not checkpoints.exists()


def test_a_training_is_not_begun_anew_under_another_run(
    tiny_teacher: Path, tmp_path: Path, other_run: subprocess.Popen[str]
) -> None:
    """Nor are its checkpoints taken for one's own, after the other has been stopped."""
    one = with_fingerprints(recipe(tiny_teacher, init="scratch", num_layers=2))
    checkpoints = checkpoint_folder(one, tmp_path / "runs")
    checkpoints.parent.mkdir(parents=True)
    checkpoints.symlink_to(tmp_path / "trainings")
    with pytest.raises(UserError, match=r"^--no-cache: .*/held: another run trains there"):
        run_recipe(one, tmp_path / "runs", reuse=False)
    assert (checkpoints / "held").exists()
