"""What the component says of a field that there is not."""

from pathlib import Path

from components.testing import arguments, error_of

from ..component import promote


def test_a_field_that_there_is_not_is_named(tmp_path: Path) -> None:
    given = arguments(promote, tmp_path) | {"promote_recipe": {"aliass": "x"}}
    assert "did you mean 'alias'" in error_of(promote, given, tmp_path)
