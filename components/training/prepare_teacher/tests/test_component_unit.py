"""What the component says of a field that there is not."""

from pathlib import Path

from components.testing import arguments, error_of

from ..component import prepare_teacher


def test_a_field_that_there_is_not_is_named(tmp_path: Path) -> None:
    given = arguments(prepare_teacher, tmp_path) | {"teacher_recipe": {"sorce": 1}}
    assert "did you mean 'source'" in error_of(prepare_teacher, given, tmp_path)
