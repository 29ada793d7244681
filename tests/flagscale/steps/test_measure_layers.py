"""measure-layers: each measurement once, and what students make of it."""

import json
from pathlib import Path

import pytest

from flagscale.artifacts import open_artifact
from flagscale.errors import UserError
from flagscale.execution.absent import write_absent
from flagscale.recipe import ReconstructionRecipe, StudentRecipe
from flagscale.steps.convert_student import convert_student
from flagscale.steps.measure_layers import measure_layers
from flagscale.steps.student import measured_layers

TEXT = {"calibration_tokens": 130}
THREE = StudentRecipe(num_layers=3, layer_importance="kl", **TEXT)
TWO = StudentRecipe(
    num_layers=2, layer_importance="kl", reconstruction=ReconstructionRecipe(tokens=64), **TEXT
)
TURNING = StudentRecipe(num_layers=2, layer_importance="block_influence", **TEXT)
OTHERS = (
    StudentRecipe(num_layers=2),
    StudentRecipe(num_layers=9, layer_importance="kl"),  # is refused by itself
    StudentRecipe(num_layers=4, layer_importance="kl", calibration_tokens=64),  # all stay
)


@pytest.fixture(scope="module")
def importance(teacher: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("importance") / "measured"
    figures = measure_layers([THREE, TWO, TURNING, *OTHERS], teacher, dataset, folder)
    assert figures == {"measurements": 2.0, "tokens": 256.0}
    return folder


def chosen(folder: Path) -> str:
    return (folder / measured_layers.FILE).read_text()


def test_each_is_made_once_for_as_many_layers_as_go(importance: Path) -> None:
    found = json.loads(chosen(importance))
    asked = [one["asked"]["layer_importance"] for one in found]
    assert asked == ["kl", "block_influence"]
    assert [len(one["removals"]) for one in found] == [2, 2]
    assert set(open_artifact(importance, "layer-importance").parents) == {"teacher", "dataset"}


@pytest.mark.parametrize("student", [THREE, TURNING], ids=["kl", "block influence"])
def test_students_are_those_that_measured_themselves(
    student: StudentRecipe,
    importance: Path,
    teacher: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    convert_student(student, teacher, dataset, tmp_path / "alone")
    monkeypatch.delattr(measured_layers, "measure_importance")
    convert_student(student, teacher, dataset, tmp_path / "given", importance=importance)
    assert chosen(tmp_path / "given") == chosen(tmp_path / "alone")
    ours, theirs = (open_artifact(tmp_path / one, "student") for one in ("given", "alone"))
    assert ours.facts["keep_layers"] == theirs.facts["keep_layers"]


def found(student: StudentRecipe, folder: Path | None, teacher: Path, dataset: Path) -> object:
    return measured_layers.measured_before(student, folder, teacher, dataset, gone=1)


def test_what_was_not_measured_is_not_found(
    importance: Path, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    assert found(THREE, importance, teacher, dataset)
    assert found(THREE, None, teacher, dataset) is None
    for changes in ({"calibration_tokens": 64}, {"seed": 1}):
        other = THREE.model_copy(update=changes)
        assert found(other, importance, teacher, dataset) is None
    write_absent(tmp_path / "absent", "measure-layers", "no memory", {})
    assert found(THREE, tmp_path / "absent", teacher, dataset) is None


def test_another_teachers_are_refused(importance: Path, student: Path, dataset: Path) -> None:
    with pytest.raises(UserError, match="the layers of another teacher were measured"):
        found(THREE, importance, student, dataset)
