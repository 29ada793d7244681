"""What the component says of a field that there is not."""

from pathlib import Path

from components.testing import arguments, error_of

from ..component import export_winner


def test_a_field_that_there_is_not_is_named(tmp_path: Path) -> None:
    given = arguments(export_winner, tmp_path) | {"export_recipe": {"formt": 1}}
    assert "did you mean 'format'" in error_of(export_winner, given, tmp_path)
