"""What the component says of an input that is gone."""

from pathlib import Path

from components.testing import arguments, error_of

from ..component import record_many


def test_an_input_that_is_gone_is_named(tmp_path: Path) -> None:
    given = arguments(record_many, tmp_path, ranking="s3://bucket/gone")
    assert "ranking: nothing is left at s3://bucket/gone" in error_of(record_many, given, tmp_path)
