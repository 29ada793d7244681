"""What the component says of a field that there is not."""

from pathlib import Path

from components.testing import arguments, error_of

from ..component import check_recipe


def test_a_field_that_there_is_not_is_named(tmp_path: Path) -> None:
    given = arguments(check_recipe, tmp_path) | {"made": {"parameter": ["data"]}}
    assert "did you mean 'parameters'" in error_of(check_recipe, given, tmp_path)
