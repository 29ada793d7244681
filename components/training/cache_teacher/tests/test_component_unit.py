"""What the component says of a field that there is not."""

from pathlib import Path

from components.testing import arguments, error_of

from ..component import cache_teacher


def test_a_field_that_there_is_not_is_named(tmp_path: Path) -> None:
    given = arguments(cache_teacher, tmp_path) | {"teacher_outputs_recipe": {"codecc": 1}}
    assert "did you mean 'codec'" in error_of(cache_teacher, given, tmp_path)
