"""What the component says of a field that there is not."""

from pathlib import Path

from components.testing import arguments, error_of

from ..component import evaluate


def test_a_field_that_there_is_not_is_named(tmp_path: Path) -> None:
    given = arguments(evaluate, tmp_path) | {"evaluation_recipe": {"max_document": 1}}
    assert "did you mean 'max_documents'" in error_of(evaluate, given, tmp_path)
