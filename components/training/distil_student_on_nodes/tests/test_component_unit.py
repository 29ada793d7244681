"""What the component says of a field that there is not."""

from pathlib import Path

from components.testing import arguments, error_of

from ..component import distil_student_on_nodes


def test_a_field_that_there_is_not_is_named(tmp_path: Path) -> None:
    given = arguments(distil_student_on_nodes, tmp_path) | {"training_recipe": {"train_iter": 1}}
    assert "did you mean 'train_iters'" in error_of(distil_student_on_nodes, given, tmp_path)
