"""A step of one of many students fails and the run goes on: what is left, and passed on."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from components.evaluation.evaluate.component import evaluate
from components.training.distil_student.component import distil_student
from flagscale.artifacts import new_artifact, open_artifact
from flagscale.errors import Interrupted, UserError
from flagscale.execution.absent import absent, is_empty, reason, write_absent
from flagscale.execution.step_process import step_process
from flagscale.recipe import DistillationRecipe, StudentRecipe
from pipelines.local.step_cache import _damage

STUDENT = StudentRecipe(num_layers=2)


@dataclass
class Given:
    """What KFP hands over."""

    path: str
    uri: str = "kfp://"


@pytest.mark.parametrize(
    ("error", "told"),
    [(UserError("it does not fit"), "it does not fit"), (ValueError("a bug"), "ValueError: a bug")],
)
def test_a_failure_stands_where_the_output_was_to_be(
    tmp_path: Path, error: Exception, told: str
) -> None:
    with step_process("convert-student", record_failure_at=str(tmp_path / "student")) as step:
        step.section(StudentRecipe, {"num_layers": 2})
        raise error
    manifest = absent(tmp_path / "student")
    assert manifest is not None
    assert reason(manifest) == f"convert-student: {told}"
    assert not is_empty(manifest)
    assert manifest.recipe == {"student": STUDENT.model_dump(mode="json")}
    with pytest.raises(UserError, match="is a 'absent', but a 'student' is needed"):
        open_artifact(tmp_path / "student", "student")


def test_the_next_steps_pass_it_on_with_what_they_were_to_do(tmp_path: Path) -> None:
    recipe = {"student": STUDENT.model_dump(mode="json")}
    write_absent(tmp_path / "student", "convert-student", "why", recipe)
    with step_process("distil-student", record_failure_at=str(tmp_path / "distilled")) as step:
        step.section(DistillationRecipe, {})
        step.input("student", Given(str(tmp_path / "student")))
        raise AssertionError("there is no student")
    manifest = absent(tmp_path / "distilled")
    assert manifest is not None
    assert reason(manifest) == "convert-student: why"
    assert set(manifest.recipe) == {"student", "distillation"}


def test_a_variant_that_failed_is_known_by_all_its_sections_after_the_last_step(
    tmp_path: Path,
) -> None:
    """By way of the components, which look for the student before they import what would train."""
    write_absent(tmp_path / "student", "convert-student", "why", {"student": {"num_layers": 2.0}})
    given, paths = Given(str(tmp_path / "student")), (tmp_path / "distilled", tmp_path / "measured")
    common = {"code_version": "", "experiment": "", "accelerators": "0"}
    distil_student.python_func(
        distillation_recipe={"temperature": 2.0},
        training_recipe={"train_iters": 5.0, "lr": 1e-3},
        checkpoints="",
        of_many={"record_failure": True},
        distilled_student=Given(str(paths[0])),
        training_metrics=None,
        **dict.fromkeys(("teacher", "student", "dataset"), given),
        **common,
    )
    evaluate.python_func(
        evaluation_recipe={},
        models_recipe={},
        record_failure=True,
        student=given,
        distilled_student=Given(str(paths[0])),
        evaluation=Given(str(paths[1])),
        report=None,
        evaluation_summary=None,
        evaluation_metrics=None,
        **dict.fromkeys(("teacher", "dataset"), given),
        **common,
    )
    manifest = absent(paths[1])
    assert manifest is not None
    assert reason(manifest) == "convert-student: why"
    assert set(manifest.recipe) == {"student", "distillation", "training"}
    assert manifest.recipe["distillation"]["temperature"] == 2.0


def test_what_a_student_was_made_of_is_known_from_the_inputs(tmp_path: Path) -> None:
    with new_artifact(tmp_path / "student", "student", {"student": {"num_layers": 2}}):
        pass
    with step_process("distil-student", record_failure_at=str(tmp_path / "distilled")) as step:
        step.input("student", Given(str(tmp_path / "student")))
        raise UserError("no room")
    manifest = absent(tmp_path / "distilled")
    assert manifest is not None
    assert manifest.recipe["student"] == {"num_layers": 2}


def test_alone_a_step_that_fails_or_lacks_its_input_ends_the_run(tmp_path: Path) -> None:
    write_absent(tmp_path / "student", "convert-student", "why", {})
    with pytest.raises(SystemExit) as ended, step_process("evaluate") as step:
        step.input("student", Given(str(tmp_path / "student")))
    assert ended.value.code == 1
    with pytest.raises(SystemExit) as ended, step_process("evaluate"):
        raise UserError("no")
    assert ended.value.code == 1


def test_a_step_that_was_stopped_has_not_failed(tmp_path: Path) -> None:
    """It is to go on where it was: nothing is recorded that would keep it from that."""
    output = tmp_path / "distilled"
    with pytest.raises(SystemExit) as ended, step_process("x", record_failure_at=str(output)):
        raise Interrupted("stopped after step 3")
    assert ended.value.code == 143
    assert not output.exists()


def test_the_local_cache_tries_again_what_failed_but_not_what_had_nothing_to_do(
    tmp_path: Path,
) -> None:
    write_absent(tmp_path / "failed", "distil-student", "no room", {})
    write_absent(tmp_path / "empty", "pick-candidate", "nothing to do", {}, empty=True)
    assert _damage(tmp_path / "failed") == "there was none: distil-student: no room"
    assert _damage(tmp_path / "empty") is None
