"""What the component says of a field that there is not."""

from pathlib import Path

from components.testing import arguments, error_of

from ..component import convert_student


def test_a_field_that_there_is_not_is_named(tmp_path: Path) -> None:
    given = arguments(convert_student, tmp_path) | {"student_recipe": {"num_layer": 1}}
    assert "did you mean 'num_layers'" in error_of(convert_student, given, tmp_path)
