"""What the component says of a field that there is not."""

from pathlib import Path

from components.testing import arguments, error_of

from ..component import prepare_data


def test_a_field_that_there_is_not_is_named(tmp_path: Path) -> None:
    given = arguments(prepare_data, tmp_path) | {"data_recipe": {"seq_lenght": 1}}
    assert "did you mean 'seq_length'" in error_of(prepare_data, given, tmp_path)
