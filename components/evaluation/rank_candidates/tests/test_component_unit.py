"""What the component says of a field that there is not."""

from pathlib import Path

from components.testing import arguments, error_of

from ..component import rank_candidates


def test_a_field_that_there_is_not_is_named(tmp_path: Path) -> None:
    given = arguments(rank_candidates, tmp_path) | {"ranking_recipe": {"slot": 1}}
    assert "did you mean 'slots'" in error_of(rank_candidates, given, tmp_path)
