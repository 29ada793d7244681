"""What the component says of an input that is gone."""

from pathlib import Path

from components.testing import arguments, error_of

from ..component import pick_candidate


def test_an_input_that_is_gone_is_named(tmp_path: Path) -> None:
    given = arguments(pick_candidate, tmp_path, search="s3://bucket/gone")
    assert "search: nothing is left at s3://bucket/gone" in error_of(
        pick_candidate, given, tmp_path
    )
